"""Named settings of ``elk-stress run``: probes, attacks, threats and the pairs to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS"]

_NATURAL = (
    "item/natural/gaussian",
    "item/natural/gaussian/kept",
    "universal/natural/gaussian",
    "universal/natural/gaussian/kept",
)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "probes": "rock,random_direction,mass_mean,lda,logistic,ccs",
        "attacks": "isotropic_noise,natural_thoughts,gradient,best_of_n",
    },
    # the model games the probe by its thoughts: every attack at the site
    "thoughts": {
        "probes": "mass_mean,lda,logistic,ccs,oracle,paper",
        "attacks": "all",
        "threats": ",".join(_NATURAL),
    },
    # the same by what it puts into its own context; minutes per attack
    "prefixes": {
        "probes": "logistic,mass_mean,ccs",
        "attacks": "soft_prompt,token_prefix,token_prefix_search,token_prefix_random",
        "threats": ",".join(_NATURAL[:2]),
    },
    # every probe of one activation, its defences compared with what they defend
    "zoo": {
        "probes": "oracle,paper,rock,random_direction,mass_mean,lda,logistic,mlp,quadratic,sparse,ensemble,"
        "ccs,crc,vinc,mahalanobis,logistic_tails,flow,nearest_neighbours,"
        "lipschitz,adversarially_trained,orthogonal_ensemble,secret_subspace,causal",
        "attacks": "gradient,silent_thoughts,steer,erase,black_box",
        "threats": ",".join((*_NATURAL[:3], "item/isotropic0.3/gaussian")),
        "compare": "lipschitz:mlp,ensemble:mlp,adversarially_trained:logistic,orthogonal_ensemble:logistic,"
        "secret_subspace:logistic,causal:logistic",
    },
    # every probe of tokens, beside one of the last token alone; behaviour is free
    "tokens": {
        "probes": "logistic,attention_pool,max_pool,rolling_mean,context_average,site_ensemble",
        "attacks": "gradient,black_box",
        "threats": "item/natural/gaussian,item/isotropic0.3/gaussian",
        "compare": "attention_pool:logistic,max_pool:logistic,rolling_mean:logistic,context_average:logistic",
    },
}
"""Named settings; flags given beside ``--preset`` win."""
