"""``elk-stress``: stress probes on a testbed from the command line, and list what is registered.

Exit codes: 0 done; 1 no probe could be stressed; 2 bad usage or bad input (one line on stderr, never a traceback);
3 with ``--strict`` when red flags were raised or a probe failed; 130 after Ctrl-C, when what was finished is written.

Tables or, with ``--json``, the complete result go to stdout; progress and messages to stderr. Nothing heavy is imported
before the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from elk_stress.cli.presets import PRESETS
from elk_stress.core.printable import printable
from elk_stress.core.settings import SETTINGS, option, shown

if TYPE_CHECKING:
    from elk_stress.thoughts.run_result import RunResult
    from elk_stress.threats.threat import Threat

__all__ = ["main"]

DONE, FAILED, USAGE, FLAGGED, INTERRUPTED = 0, 1, 2, 3, 130

_EXAMPLES = """\
examples:
  elk-stress run --testbed statements --preset demo
      six probes and four attacks on a small language model; a few minutes
  elk-stress run --testbed statements --size full --out runs/full
      all items and contexts; under an hour, and activations are cached
  elk-stress run --testbed linear --probes lda,logistic --threats item/natural/gaussian
      Gaussian activations whose bits are known in closed form; seconds
  elk-stress run --model ./my-model --data mine.jsonl --site layers.12 --probes logistic
      a model and data of your own: one JSON object a line with text, label (1 = positive)
      and optionally group (items of one group stay in one split) and pair (contrast pairs)
  elk-stress run --probe probe.safetensors --activations a.safetensors --labels y.npy
      a saved probe on arrays of your own, without any model; (n, d), or (n, contexts, d) for moves as
      different as your contexts make them
  elk-stress run --testbed statements --tokens 4 --preset tokens
      probes of the last four tokens
  elk-stress run --testbed linear --reads 4 --probes context_average --moved together
      a monitor that reads every item in four contexts, against thoughts that are the same in all of them
  elk-stress probes --json
      what is registered, yours included
  a killed run goes on where it stopped when the same command is given with the same --out
"""
_TRAIN_EXAMPLES = """\
examples:
  elk-stress train --testbed superposition --probes mass_mean,lda,logistic
      fine-tuning against three probes of a small learned model; minutes
  elk-stress train --testbed vault --probes logistic --attack reinforce --modes frozen,refit
      the probe's score as a reward only; a defender that refits
  elk-stress train --testbed statements --attack lora --probes lda --strengths 1 --steps 60
      a LoRA adapter on a small language model
  a killed run goes on where it stopped when the same command is given with the same --out
"""
_LISTS = {"probes": "probes that can be stressed", "attacks": "attacks", "testbeds": "testbeds"}


_LONGEST = 500
"""Characters of a message about an argument."""


class _BadInput(Exception):
    """One clear line for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse repeats what came in full
        short = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
        raise _BadInput(f"{short} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        from elk_stress.cli.ledger import run_ledger

        options = _parser().parse_args(arguments)
        for name, value in vars(options).items():
            # what argparse makes of a value that is two hyphens
            if isinstance(value, list) and ([] in value or not value):
                raise _BadInput(f"--{name.replace('_', '-')}: expected a value, got '--'")
        commands = {"run": _run, "train": _train, "ledger": run_ledger}
        return commands.get(options.command, _list)(options)
    except _BadInput as error:
        _say(error)
        return USAGE
    except BrokenPipeError:
        # the reader of our output has left (`| head`); nothing is wrong
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        print("elk-stress: interrupted before any probe was finished", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from elk_stress import __version__
    from elk_stress.cli.ledger import add_ledger

    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="elk-stress",
        description="How many bits of optimization does a probe survive?",
        epilog=_EXAMPLES + "\nexit codes: 0 done; 1 no probe could be stressed; 2 bad usage or input; "
        "3 red flags (with --strict); 130 Ctrl-C",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"elk-stress {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_run(commands.add_parser("run", help="stress probes on a testbed", epilog=_EXAMPLES, formatter_class=raw))
    _add_train(
        commands.add_parser("train", help="train a model against probes", epilog=_TRAIN_EXAMPLES, formatter_class=raw)
    )
    add_ledger(commands)
    for name, what in _LISTS.items():
        listing = commands.add_parser(name, help=f"list the {what}")
        listing.add_argument("--json", action="store_true", help="as one JSON object, name -> description")
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    what = run.add_argument_group("what")
    what.add_argument("--testbed", metavar="NAME", help="registered name (default: statements)")
    what.add_argument("--preset", metavar="NAME", help=f"named settings: {', '.join(PRESETS)}")
    what.add_argument(
        "--probes",
        metavar="all|A,B",
        help="names; testbeds of known truth also know oracle and paper; all: registered ones that apply, the others "
        "are listed (default)",
    )
    what.add_argument(
        "--probe",
        action="append",
        type=Path,
        metavar="FILE",
        help="a saved probe, *.safetensors or a folder; may be given several times, with --probes or without",
    )
    what.add_argument("--attacks", metavar="all|none|A,B", help="names; all: those that apply (default)")
    what.add_argument(
        "--threats",
        default="default",
        metavar="default|free|A,B",
        help="threats as scope/prior/tail[/kept], e.g. item/natural/best/kept; free: the default ones without the kept",
    )
    _add_compare(what)
    where = run.add_argument_group("model and data")
    where.add_argument("--size", choices=("demo", "full"), help="how much data (default: demo)")
    where.add_argument("--model", metavar="ID_OR_PATH", help="Hugging Face model or local folder")
    where.add_argument("--revision", metavar="NAME", help="of a Hugging Face model: a commit, branch or tag")
    where.add_argument("--data", type=Path, metavar="FILE.jsonl", help="fields text, label and optionally group, pair")
    where.add_argument("--relation", metavar="NAME", help="which facts to state")
    where.add_argument(
        "--positive",
        metavar="false|true|LABEL",
        help="which statements a monitor must catch; with --activations: which label is positive",
    )
    where.add_argument("--site", metavar="auto|layers.N", help="where to read; auto: chosen on a validation split")
    where.add_argument(
        "--tokens", type=option("tokens"), metavar="T", help="read the last T tokens, for probes of tokens"
    )
    where.add_argument(
        "--reads", type=option("reads"), metavar="K", help="read every item in K neutral contexts at once"
    )
    where.add_argument(
        "--moved", choices=("apart", "together"), help="thoughts in the K contexts: independent (default), or the same"
    )
    where.add_argument("--dtype", metavar="NAME", help="of the model, e.g. float32, bfloat16")
    where.add_argument("--device", metavar="NAME", help="of the model, e.g. cpu, cuda")
    arrays = run.add_argument_group("arrays instead of a model (.safetensors or .npy)")
    arrays.add_argument("--activations", type=Path, metavar="FILE", help="(n, d) or (n, contexts, d)")
    arrays.add_argument("--labels", type=Path, metavar="FILE", help="(n,), 1 = positive, else 0; or --positive")
    arrays.add_argument("--groups", type=Path, metavar="FILE", help="(n,): items of one group stay in one split")
    how = run.add_argument_group("how")
    how.add_argument(
        "--fpr", type=option("fpr"), default=0.05, metavar="RATE", help="false-positive rate (default: 0.05)"
    )
    how.add_argument("--epsilon", type=option("epsilon"), metavar="NATS", help="behaviour kept: shift at most this")
    how.add_argument("--max-bits", type=option("max_bits"), metavar="BITS", help="items are censored beyond")
    how.add_argument("--seed", type=option("seed"), default=0, help="all randomness (default: 0)")
    how.add_argument("--fresh", action="store_true", help="compute everything, whatever --out holds of an earlier run")
    _add_output(run, "<testbed>-<preset>")


def _add_compare(group: Any) -> None:
    group.add_argument(
        "--compare",
        metavar="A:B,C:D",
        help="pairs of probes to compare, chosen beforehand; default: all with all, which corrects for all",
    )


def _add_train(train: argparse.ArgumentParser) -> None:
    what = train.add_argument_group("what")
    what.add_argument("--testbed", default="superposition", metavar="NAME", help="default: superposition")
    what.add_argument(
        "--probes", default="mass_mean,lda,logistic", metavar="A,B", help="names; organisms also know oracle and paper"
    )
    what.add_argument("--attack", default="finetune", metavar="NAME", help="one that moves weights (default: finetune)")
    what.add_argument("--modes", default="frozen", metavar="A,B", help="frozen, refit, ensemble (default: frozen)")
    what.add_argument("--against", default="", metavar="A,B", help="also trained against, in mode ensemble")
    _add_compare(what)
    what.add_argument("--size", choices=("demo", "full"), help="how much data a language-model testbed reads")
    how = train.add_argument_group("how")
    how.add_argument("--strengths", metavar="X,Y", help="weights of the evasion; 0, the benign control, is added")
    how.add_argument("--steps", type=option("steps"), metavar="N", help="default: the attack's own")
    how.add_argument(
        "--checkpoints", type=option("checkpoints"), default=10, metavar="N", help="measurements (default: 10)"
    )
    how.add_argument(
        "--draws", type=option("draws"), default=4, metavar="N", help="noise draws per measurement (default: 4)"
    )
    how.add_argument("--models", type=option("n_models"), metavar="N", help="models (seeds) trained side by side")
    how.add_argument("--source", choices=("prior", "finetunes"), help="candidates of select_best")
    how.add_argument(
        "--epsilon", type=option("epsilon"), default=0.03, metavar="NATS", help="behaviour kept (default: 0.03)"
    )
    how.add_argument("--no-bits", action="store_true", help="leave out B, the bits needed")
    how.add_argument("--seed", type=option("seed"), default=0, help="all randomness (default: 0)")
    _add_output(train, "<testbed>-<attack>")


def _add_output(command: argparse.ArgumentParser, folder: str) -> None:
    output = command.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help=f"default: runs/{folder}-<date-time>")
    output.add_argument("--json", action="store_true", help="print the complete result instead of tables")
    output.add_argument("--strict", action="store_true", help="exit with 3 if red flags were raised")
    output.add_argument("--no-progress", action="store_true", help="no progress bars")
    output.add_argument("--traceback", action="store_true", help="show where an error came from")


def _train(options: argparse.Namespace) -> int:
    from elk_stress.core import registry

    _names("testbeds", options.testbed)
    _names("attacks", options.attack)
    probes = _names("probes", options.probes)
    against = [name.strip() for name in options.against.split(",") if name.strip()]
    try:
        numbers = None if options.strengths is None else options.strengths.split(",")
        strengths = numbers and [SETTINGS["strengths"].parse(x) for x in numbers]
    except ValueError:
        raise _BadInput(
            f"--strengths are numbers of at least 0 with commas between, e.g. 0.1,1,10; got {shown(options.strengths)}"
        ) from None
    pairs = _pairs(options.compare, None, probes)
    out = options.out or Path("runs") / "-".join(
        [options.testbed, options.attack, datetime.now().strftime("%Y%m%d-%H%M%S")]
    )
    from elk_stress.models.threads import configure_threads

    configure_threads()
    from elk_stress.core.extras import MissingExtra
    from elk_stress.models.sources import ModelUnavailable
    from elk_stress.runs.train import TrainingInterrupted, train

    code = DONE
    try:
        takes = registry.options("testbeds", options.testbed)
        given = {"n_models": options.models, "seed": options.seed, "size": options.size}
        testbed = registry.load(
            "testbeds", options.testbed, **{k: v for k, v in given.items() if v is not None and k in takes}
        )
        source = {} if options.source is None else {"source": options.source}
        with _progress(options) as progress:
            result = train(
                testbed,
                probes,
                out=out,
                attack=registry.load("attacks", options.attack, **source),
                modes=[mode.strip() for mode in options.modes.split(",")],
                against=against,
                strengths=strengths,
                steps=options.steps,
                checkpoints=options.checkpoints,
                draws=options.draws,
                epsilon=options.epsilon,
                bits=not options.no_bits,
                pairs=pairs,
                seed=options.seed,
                progress=progress,
            )
    except TrainingInterrupted as interrupted:
        result, code = interrupted.result, INTERRUPTED
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, ModelUnavailable, MissingExtra) as error:
        if options.traceback or isinstance(error, IndexError) or type(error) is KeyError:
            raise
        raise _BadInput(_one_line(error)) from error
    if options.json:
        json.dump(result.to_json(), sys.stdout, allow_nan=False)
        print()
    else:
        from rich.console import Console

        from elk_stress.report import pressure

        console = Console()
        pressure.show(console if console.is_terminal else Console(width=140), result)
    for name, reason in result.failures.items():
        _say(f"{name} failed: {reason}")
    print(printable(f"written to {out}"), file=sys.stderr if options.json else sys.stdout)
    if code == DONE and not result.results:
        return FAILED
    return FLAGGED if code == DONE and options.strict and result.red else code


def _run(options: argparse.Namespace) -> int:
    preset = _preset(options.preset)
    asked_probes = options.probes or preset.get("probes") or ("" if options.probe else "all")
    probes = _names("probes", asked_probes) if asked_probes else []
    _check_arrays(options)
    attacks = options.attacks or preset.get("attacks", "all")
    chosen = attacks if attacks == "all" else [] if attacks == "none" else _names("attacks", attacks)
    asked = options.threats if options.threats != "default" else preset.get("threats", "default")
    threats = _threats(asked, options.epsilon)
    options.testbed = options.testbed or ("arrays" if options.activations else "statements")
    if not options.activations:
        _names("testbeds", options.testbed)
    if options.data is not None and not options.data.is_file():
        raise _BadInput(f"--data {options.data}: no such file; expected JSON lines with fields text and label")
    out = options.out or Path("runs") / "-".join(
        [options.testbed, options.preset or options.size or "demo", datetime.now().strftime("%Y%m%d-%H%M%S")]
    )
    # before numpy, torch or jax are loaded: OpenMP reads its environment once
    from elk_stress.models.threads import configure_threads

    configure_threads()
    from elk_stress.core.extras import MissingExtra
    from elk_stress.models.sources import ModelUnavailable
    from elk_stress.probing.probe import FittedProbe
    from elk_stress.runs.folder import check_folder
    from elk_stress.runs.stress import Interrupted, run
    from elk_stress.testbeds.array_loading import arrays_testbed

    code, existed = DONE, out.exists()
    try:
        check_folder(out)
        given = [FittedProbe.load(path) for path in options.probe or ()]
        if options.activations:
            testbed = arrays_testbed(
                options.activations,
                options.labels,
                options.groups,
                [*given, *probes],
                options.seed,
                options.positive,
            )
            threats = testbed.threats if threats is None else threats
        else:
            testbed = _testbed(options)
        with _progress(options) as progress:
            result = run(
                testbed,
                [*given, *probes],
                out=out,
                attacks=chosen,
                threats=threats,
                behaviour_epsilon=options.epsilon,
                max_bits=options.max_bits,
                seed=options.seed,
                fpr=options.fpr,
                progress=progress,
                config={"command": _settings(options)},
                pairs=_pairs(options.compare, preset.get("compare"), [*given, *probes]),
                fresh=options.fresh,
                tell=lambda line: _tell(progress, line),
            )
    except Interrupted as interrupted:
        result, code = interrupted.result, INTERRUPTED
    except (OSError, ValueError, LookupError, TypeError, ModelUnavailable, MissingExtra) as error:
        # a traceback is for mistakes in the code; these say what was expected, what came, and the way out
        if options.traceback or isinstance(error, IndexError) or type(error) is KeyError:
            raise
        if not existed:
            # made by the check above and still empty, unless something was finished
            with suppress(OSError):
                out.rmdir()
        raise _BadInput(_one_line(error)) from error
    _show(result, out, options)
    if code == DONE and not result.results:
        return FAILED if set(result.failures) - set(result.refused) else USAGE
    if code == DONE and options.strict and result.red:
        print("red flags were raised: with --strict the exit code is 3", file=sys.stderr)
        return FLAGGED
    return code


def _show(result: RunResult, out: Path, options: argparse.Namespace) -> None:
    if options.json:
        json.dump(result.to_json(), sys.stdout, allow_nan=False)
        print()
    else:
        from rich.console import Console

        from elk_stress.report import tables

        console = Console()
        if not console.is_terminal:
            # a file or a pipe has no width; the tables are made for this one
            console = Console(width=120)
        tables.show(console, result.results, skipped=result.not_applicable)
    for name, reason in result.failures.items():
        _say(f"probe {name} failed: {reason}")
    if result.status == "interrupted":
        done = ", ".join(r.probe for r in result.results) or "none"
        _say(f"interrupted; finished probes: {done}")
    if result.results or result.failures:
        print(printable(f"written to {out}"), file=sys.stderr if options.json else sys.stdout)


def _list(options: argparse.Namespace) -> int:
    from elk_stress.core import registry

    found = registry.describe(options.command)
    if options.json:
        print(json.dumps(found, indent=2))
        return DONE
    width = max((len(name) for name in found), default=0)
    for name, what in found.items():
        print(printable(f"{name:<{width}}  {what}"))
    return DONE


def _preset(name: str | None) -> Mapping[str, Any]:
    if name is not None and name not in PRESETS:
        raise _BadInput(f"no preset is called {name!r}. Known presets: {', '.join(PRESETS)}")
    return PRESETS[name] if name is not None else {}


def _names(group: Any, text: str) -> list[str]:
    """Registered names; unknown ones are refused here, before any work, with the known ones listed."""
    from elk_stress.core import registry
    from elk_stress.testbeds.protocol import PLANTED

    known = registry.names(group)
    if text == "all":
        return known
    asked = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not asked:
        raise _BadInput(f"--{group} names nothing. Known {group}: {', '.join(known)}")
    for name in asked:
        if name not in known and not (group == "probes" and name in PLANTED):
            raise _BadInput(str(registry.unknown(group, name)))
    return asked


def _threats(text: str, epsilon: float | None) -> tuple[Threat, ...] | None:
    from dataclasses import replace

    from elk_stress.threats.threat import default_threats, parse_threat

    if text == "default":
        return None
    if text == "free":
        return default_threats(kept=False)
    try:
        found = [parse_threat(name.strip()) for name in text.split(",") if name.strip()]
    except ValueError as error:
        raise _BadInput(f"--threats: {error}") from None
    if not found:
        raise _BadInput(f"--threats names nothing. Default threats: {', '.join(t.name for t in default_threats())}")
    return tuple(replace(threat, epsilon=epsilon) if threat.kept else threat for threat in found)


def _pairs(text: str | None, usual: str | None, probes: Sequence[Any]) -> list[tuple[str, str]] | None:
    """``A:B,C:D`` as pairs; of a preset's own those that are run."""
    given = text or usual
    if given is None:
        return None
    found = [tuple(part.strip() for part in pair.split(":")) for pair in given.split(",") if pair.strip()]
    if not found or any(len(pair) != 2 or not all(pair) for pair in found):
        raise _BadInput(f"--compare reads A:B,C:D, e.g. lipschitz:mlp,causal:logistic; got {text!r}")
    names = {probe if isinstance(probe, str) else probe.name for probe in probes}
    pairs = [(a, b) for a, b in found]
    return pairs if text else [pair for pair in pairs if set(pair) <= names] or None


def _check_arrays(options: argparse.Namespace) -> None:
    """Arrays come with their labels, and with nothing that belongs to a model."""
    if options.activations is None:
        lone = [f"--{name}" for name in ("labels", "groups") if getattr(options, name) is not None]
        if lone:
            raise _BadInput(f"{', '.join(lone)} without --activations; give the arrays that they belong to")
        return
    if options.labels is None:
        raise _BadInput("--activations needs --labels: (n,), 1 = positive, else 0, as .npy or .safetensors")
    model = ["testbed", "size", "model", "revision", "data", "relation", "site", "tokens", "dtype", "device"]
    model += ["reads", "moved", "epsilon"]
    refused = [f"--{name}" for name in model if getattr(options, name) is not None]
    if refused:
        raise _BadInput(f"--activations are arrays without a model; {', '.join(refused)} does not apply to them")
    for name in ("activations", "labels", "groups"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise _BadInput(f"--{name} {path}: no such file; expected .safetensors or .npy")


def _testbed(options: argparse.Namespace) -> Any:
    """The testbed with the options that were given; seed and size only where it takes them."""
    from elk_stress.core import registry

    takes = registry.options("testbeds", options.testbed)
    given = {
        name: getattr(options, name)
        for name in ("size", "model", "revision", "data", "relation", "positive", "site", "tokens", "dtype", "device")
        if getattr(options, name) is not None
    }
    refused = [name for name in given if name not in takes]
    if refused:
        flags = ", ".join(f"--{name}" for name in refused)
        raise _BadInput(
            f"testbed {options.testbed!r} does not take {flags}; it takes: {', '.join(takes) or 'no options'}"
        )
    if "seed" in takes:
        given["seed"] = options.seed
    made = registry.load("testbeds", options.testbed, **given)
    if options.reads is None:
        if options.moved is not None:
            raise _BadInput("--moved says how thoughts move in several contexts; give their number with --reads")
        return made
    from elk_stress.testbeds.repeated_reads import RepeatedReads

    return RepeatedReads(made, options.reads, options.moved or "apart")


def _progress(options: argparse.Namespace) -> Any:
    if options.no_progress:
        return nullcontext(None)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        # what is stressed is called as somebody else likes
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _tell(progress: Any, line: str) -> None:
    """A line to stderr, above the progress bars if there are any."""
    if progress is None:
        _say(line)
    else:
        progress.console.print(
            printable(f"elk-stress: {line}"), markup=False, emoji=False, highlight=False, soft_wrap=True
        )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    # only the name of a file: where it lies is nobody's business and no part of the result
    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(v) for v in value]
        return value.name if isinstance(value, Path) else value

    return {
        name: told(value)
        for name, value in vars(options).items()
        if value is not None and name not in ("command", "fresh", "json", "no_progress", "strict", "traceback")
    }


def _say(message: object) -> None:
    print(printable(f"elk-stress: {message}"), file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
