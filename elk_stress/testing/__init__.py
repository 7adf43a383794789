"""Public conformance suites: run them on your own probe, attack or testbed, in one line of your own pytest.

    from elk_stress.testing import check_probe, checks_for_probe

    def test_my_probe():
        check_probe(MyProbe())                                   # raises AssertionError naming check and broken promise

    @pytest.mark.parametrize("check", checks_for_probe(MyProbe()).items(), ids=lambda item: item[0])
    def test_mine(check):                                        # or one test per check
        check[1]()

Each suite is a dictionary of named checks, chosen by what the object declares (a probe that learns must separate
planted classes, one that does not must not; an attack that reads gradients must find a half-space at three standard
deviations at about that distance). Each has controls: something planted that must be found, and something that must
not. Where hypothesis draws the examples (shapes, dtypes, scales, batches, budgets), it draws the same each time.

============================  ==========================================================================================
``check_probe(probe)``        :mod:`elk_stress.testing.probes`: the checks, and the traits that ask for them
``check_attack(attack)``      :mod:`elk_stress.testing.attacks`; of those that know the model
                              :mod:`elk_stress.testing.model_access`
``check_training_attack``     ``(attack, trainee)``: of one that moves weights, :mod:`elk_stress.testing.training`
``check_testbed(testbed)``    :mod:`elk_stress.testing.testbeds`
``planted_classes()``         the data: rows, pairs, ``tokens()``, a ``prior`` and ``behaviour``; ``fit(probe)`` fits on
                              them whatever it declares to need (:mod:`elk_stress.testing.data`)
============================  ==========================================================================================
"""

from __future__ import annotations

from elk_stress.testing.attacks import check_attack as check_attack
from elk_stress.testing.attacks import checks_for_attack as checks_for_attack
from elk_stress.testing.data import PlantedClasses as PlantedClasses
from elk_stress.testing.data import planted_classes as planted_classes
from elk_stress.testing.probes import check_probe as check_probe
from elk_stress.testing.probes import checks_for_probe as checks_for_probe
from elk_stress.testing.shared import run_checks as run_checks
from elk_stress.testing.testbeds import check_testbed as check_testbed
from elk_stress.testing.testbeds import checks_for_testbed as checks_for_testbed
from elk_stress.testing.training import check_training_attack as check_training_attack
from elk_stress.testing.training import checks_for_training_attack as checks_for_training_attack

__all__ = [
    "PlantedClasses",
    "check_attack",
    "check_probe",
    "check_testbed",
    "check_training_attack",
    "checks_for_attack",
    "checks_for_probe",
    "checks_for_testbed",
    "checks_for_training_attack",
    "planted_classes",
    "run_checks",
]
