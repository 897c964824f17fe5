"""`kvik eval score`: metrics of predictions, each with its interval."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.metric_settings import given_settings, settings_by_metric
from kvik.cli.options import Json
from kvik.cli.output import Progress, note, plain, print_json, print_table, write
from kvik.errors import ParameterError
from kvik.params import MAX_SEED

if TYPE_CHECKING:
    from kvik.evaluation.metrics import Metric
    from kvik.evaluation.predictions import SampleFile
    from kvik.evaluation.scoring import Scored
    from kvik.evaluation.statistics import Interval

__all__ = ["ScoreOptions", "figure", "interval_text", "score"]

SETTINGS_PANEL = "Settings of metrics"
_IDS_NAMED = 5  # of samples that were not scored for one reason


def _setting(name: str, metavar: str, help: str) -> Any:
    return typer.Option(f"--{name}", metavar=metavar, show_default=False, help=help, rich_help_panel=SETTINGS_PANEL)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What is scored, and how sure the figures are to be."""

    metric: Annotated[
        str, typer.Option("--metric", metavar="NAMES", show_default=False, help="Metrics, separated by commas.")
    ]
    predictions: Annotated[
        str,
        typer.Option(
            "--predictions", metavar="FILE", show_default=False,
            help='JSON lines with "prediction" or "text": results of kvik run --batch are such.',
        ),
    ]  # fmt: skip
    references: Annotated[
        str | None,
        typer.Option(
            "--references", metavar="FILE", show_default=False,
            help='JSON lines with "reference" or "references"; not needed where the predictions have them.',
        ),
    ] = None  # fmt: skip
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="DIR", show_default=False, help="Keep it: a run's folder, for kvik compare runs."
        ),
    ] = None
    per_sample: Annotated[bool, typer.Option("--per-sample", help="Also the scores of each sample.")] = False
    level: Annotated[float, typer.Option("--level", metavar="P", help="Of the intervals, between 0 and 1.")] = 0.95
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws the intervals are made of.")] = 0
    setting: Annotated[
        list[str] | None,
        _setting("setting", "NAME=VALUE", "For the metrics that take it; METRIC.NAME=VALUE for one. May be repeated."),
    ] = None
    language: Annotated[str | None, _setting("language", "NAME", "Of code, like python.")] = None
    k: Annotated[str | None, _setting("k", "K,K…", "Of pass_at_k.")] = None
    wordnet: Annotated[str | None, _setting("wordnet", "DIR", "The synonyms that meteor may use.")] = None
    encoder: Annotated[str | None, _setting("encoder", "DIR", "The model that bertscore looks through.")] = None
    database: Annotated[str | None, _setting("database", "FILE", "What execution_accuracy asks.")] = None

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        if not 0 < self.level < 1:
            raise ParameterError(f"--level must be between 0 and 1, got {self.level}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ParameterError(f"--seed must be in [0, {MAX_SEED}], got {self.seed}")

    def settings(self, metrics: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Of each metric. Raises ParameterError for what none of them takes."""
        own = {name: getattr(self, name) for name in ("language", "k", "wordnet", "encoder", "database")}
        return settings_by_metric(metrics, given_settings(self.setting or (), own))


def score(options: ScoreOptions, json: Json = False) -> None:
    """Score predictions: each metric's value, with an interval by drawing the samples anew.

    Answers: exact_match, token_f1. Translation: bleu, chrf, ter, meteor. Summaries: rouge (rouge1, rouge2, rougeL,
    rougeLsum), bertscore. Code: pass_at_k, execution_accuracy, code_bleu. Without references: distinct_n, self_bleu,
    repetition.

    Lines of predictions and references belong together by "id" where both files have ids, else by order. A sample that
    cannot be scored counts in no figure, and is named with the reason.

    \b
    Examples:
      kvik eval score --metric rouge --predictions P.jsonl --references R.jsonl
      kvik eval score --metric bleu,chrf --predictions P.jsonl --output runs/a
      kvik eval score --metric distinct_n,repetition --predictions P.jsonl --json
    """
    from kvik.evaluation.runs import RunWriter
    from kvik.evaluation.scoring import metric_names, score_samples

    options.check()
    named = [name for name in map(str.strip, options.metric.split(",")) if name]
    if not named:
        raise ParameterError("--metric names none")
    metrics = metric_names("--metric", named)
    settings = options.settings(metrics)
    if options.output is not None:
        RunWriter.check(Path(options.output))
    samples, references = _read(options, metrics)
    found = []
    for name in metrics:
        if sys.stderr.isatty():
            note(f"{name}: {len(samples.samples)} samples", dim=True)
        given = _with_encoder(settings[name]) if name == "bertscore" else settings[name]
        found.append(score_samples(name, samples, given, level=options.level, seed=options.seed))
    report = _report(options, found, samples, references)
    if json:
        print_json(report)
    else:
        _show(options, found, samples, references)
    if options.output is not None:  # last: where there is no room, what was found is not lost
        _keep(Path(options.output), options, settings, found, samples, report)


def _read(options: ScoreOptions, metrics: tuple[str, ...]) -> tuple[SampleFile, SampleFile | None]:
    """The predictions with their references, and the file those are of where it is another."""
    from kvik.evaluation.metrics import METRICS
    from kvik.evaluation.predictions import REFERENCE, read_samples, with_references

    samples = _read_predictions(options.predictions, metrics)
    choices = [sample.fields.get("choices") for sample in samples.samples]
    several = sum(isinstance(one, list) and len(one) > 1 for one in choices)
    if several:
        note(f"{several} lines have several answers: the first of each is scored")
    if options.references is None:
        wanting = [name for name in metrics if METRICS[name].needs_references]
        if wanting and all(sample.references is None for sample in samples.samples):
            raise ParameterError(f"{wanting[0]} compares with references: name their file with --references")
        return samples, None
    references = read_samples(options.references, REFERENCE)
    return with_references(samples, references), references


def _read_predictions(name: str, metrics: tuple[str, ...]) -> SampleFile:
    """The samples: predictions, or for pass@k problems. Raises ParameterError where some metrics would count one, some the other."""
    from kvik.evaluation.predictions import PREDICTION, read_samples
    from kvik.evaluation.problems import ATTEMPTS, by_problem

    if "pass_at_k" not in metrics:
        return read_samples(name)
    attempts = read_samples(name, (*PREDICTION, *ATTEMPTS))
    problems = by_problem(attempts)
    others = [metric for metric in metrics if metric != "pass_at_k"]
    if others and problems is not attempts:
        raise ParameterError(f"pass_at_k counts problems and {others[0]} their attempts: score them apart")
    return problems


def _with_encoder(settings: dict[str, Any]) -> dict[str, Any]:
    """BERTScore's settings with the encoder opened, so that a bar tells of one that is fetched."""
    from kvik.evaluation.metrics.encoder import open_encoder

    with Progress() as progress:
        return {**settings, "encoder": open_encoder(settings.get("encoder"), settings.get("layer"), progress)}


def _report(
    options: ScoreOptions, found: list[Scored], samples: SampleFile, references: SampleFile | None
) -> dict[str, Any]:
    from kvik.evaluation.metrics import METRICS
    from kvik.evaluation.statistics import RESAMPLES

    ids = [sample.id for sample in samples.samples]
    report: dict[str, Any] = {
        "metrics": {one.metric: _entry(METRICS[one.metric], one, ids) for one in found},
        "samples": len(ids),
        "settings": {"level": options.level, "seed": options.seed, "resamples": RESAMPLES, "resampled": "samples"},
        "inputs": _inputs(samples, references),
    }
    if options.per_sample:
        report["per_sample"] = [
            {"id": id, "scores": {one.metric: one.result.per_sample[i] for one in found}} for i, id in enumerate(ids)
        ]
    return report


def _inputs(samples: SampleFile, references: SampleFile | None) -> dict[str, dict[str, str]]:
    files = {"predictions": samples} | ({} if references is None else {"references": references})
    return {role: {"name": file.name, "sha256": file.sha256} for role, file in files.items()}


def _entry(metric: Metric, one: Scored, ids: list[Any]) -> dict[str, Any]:
    result, interval = one.result, one.interval
    return {
        "value": result.value,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "no_interval": one.no_interval,
        "scored": len(ids) - len(result.unscored),
        "unscored": [{"id": ids[left.index], "reason": left.reason} for left in result.unscored],
        "parts": dict(result.parts),
        "range": [metric.low, metric.high],
        "higher_is_better": metric.higher_is_better,
        "signature": result.signature,
    }


def _keep(
    folder: Path, options: ScoreOptions, settings: dict[str, dict[str, Any]], found: list[Scored], samples: SampleFile,
    report: dict[str, Any],
) -> None:  # fmt: skip
    from kvik.evaluation.runs import REPORT, Manifest, RunSample, RunWriter
    from kvik.files import atomic_write

    reasons: dict[int, dict[str, str]] = {}
    for one in found:
        for left in one.result.unscored:
            reasons.setdefault(left.index, {})[one.metric] = left.reason
        for index, reason in one.result.reasons.items():
            reasons.setdefault(index, {})[one.metric] = reason
    manifest = Manifest(
        {one.metric: one.result.signature for one in found},
        {**report["settings"], "metrics": plain(settings)},
        report["inputs"],
    )
    with RunWriter(folder, manifest) as run:
        for i, sample in enumerate(samples.samples):
            scores = {one.metric: one.result.per_sample[i] for one in found}
            run.write(RunSample(sample.id, sample.prediction, sample.references, scores, reasons.get(i, {})))
    with atomic_write(folder / REPORT) as file:
        text = json_module.dumps(plain(report), ensure_ascii=False, allow_nan=False, indent=2)
        file.write(text.encode() + b"\n")


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def interval_text(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"


def _show(options: ScoreOptions, found: list[Scored], samples: SampleFile, references: SampleFile | None) -> None:
    from kvik.evaluation.metrics import METRICS
    from kvik.evaluation.statistics import RESAMPLES

    total = len(samples.samples)
    if options.per_sample:
        head = ["id", *(one.metric for one in found)]
        rows = [
            [str(sample.id), *(figure(one.result.per_sample[i]) for one in found)]
            for i, sample in enumerate(samples.samples)
        ]
        print_table([head, *rows], "<" + ">" * len(found))
        write("\n")
    rows = [
        [one.metric, figure(one.result.value), interval_text(one.interval), str(total - len(one.result.unscored)),
         _range(METRICS[one.metric])]
        for one in found
    ]  # fmt: skip
    print_table([["metric", "value", f"{100 * options.level:g} % interval", "scored", "range"], *rows], "<><><")
    beside = "" if references is None else f" beside {references.name}"
    write(f"\n{total} samples of {samples.name}{beside}.\n")
    if any(one.interval is not None for one in found):
        write(f"Intervals: the samples drawn anew, {RESAMPLES} times, seed {options.seed}.\n")
    remarks: dict[str, list[str]] = {}  # metrics of a group often say the same
    for one in found:
        for remark in _remarks(one, samples):
            remarks.setdefault(remark, []).append(one.metric)
    for remark, metrics in remarks.items():
        write(f"{', '.join(metrics)}: {remark}\n")
    for one in found:
        write(f"{one.metric}: {one.result.signature}\n")


def _range(metric: Metric) -> str:
    high = "up" if metric.high is None else f"to {metric.high:g}"
    return f"{metric.low:g} {high}" + ("" if metric.higher_is_better is not False else ", lower is better")


def _remarks(one: Scored, samples: SampleFile) -> list[str]:
    """What was left out and why, why there is no interval, what the value is made of."""
    reasons: dict[str, list[str]] = {}
    for left in one.result.unscored:
        reasons.setdefault(left.reason, []).append(str(samples.samples[left.index].id))
    said = []
    for reason, ids in reasons.items():
        named = ", ".join(ids[:_IDS_NAMED]) + (", …" if len(ids) > _IDS_NAMED else "")
        said.append(f"{len(ids)} not scored, {reason} (id {named})")
    if one.no_interval is not None and one.result.value is not None:
        said.append(f"no interval, {one.no_interval}")
    if one.result.parts:
        said.append(", ".join(f"{name} {figure(value)}" for name, value in one.result.parts.items()))
    return said
