"""Readers, settings and the command line under arbitrary input: each takes it, or refuses it in one line.

Every property is a strategy and a check. The examples are the same in every run.
"""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import example_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from broken import paths_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from ledger import note
from PIL import Image
from wholes import Wholes

from fastvkd import options as opt
from fastvkd.cli import _parser, main
from fastvkd.data import mllmu, sources, tables
from fastvkd.data.check import check_data
from fastvkd.data.strangers import read_strangers
from fastvkd.engines.checkpoints import bytes_per_trainable_parameter, find_latest, verify_checkpoint
from fastvkd.engines.exporting import edited_of
from fastvkd.engines.requests import requests_of
from fastvkd.errors import FastVKDError
from fastvkd.evaluation.comparison import comparison_table, read_runs
from fastvkd.evaluation.pairing import never_learnt, paired_table, paired_tests, read_samples
from fastvkd.evaluation.protocol import _Log
from fastvkd.models.folder import identify_base
from fastvkd.models.shards import header_of, read_safetensors_header, samples_of, shards_of
from fastvkd.photos import decode_image
from fastvkd.planning.plan import plan
from fastvkd.reporting.collect import collect, write_page
from fastvkd.reporting.report import build_report, read_report
from fastvkd.settings import Settings, load_settings
from fastvkd.unlearning.vkd.teacher import FeatureCache

FAULT = "fuzz executions"
THOROUGH = 10  # times as many examples in `make proofs`

ODD = (
    *(10**400, -1, 0, 2**63, 1e308, -0.0, True, None, [], {}, "", " ", "\x1b[2J", "a\u2028b", "\ud83d", "<image>"),
    *("../../etc/passwd", "a" * 300, "\0", "1e400", "NaN", "=", "-"),
)
JSON: SearchStrategy[Any] = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw: DrawFn, whole: Any) -> Any:
    """A JSON value with up to three places changed, removed or given to another key."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths_in(value))
        if not places:
            return draw(JSON)
        *parents, key = draw(st.sampled_from(places))
        inner = value
        for parent in parents:
            inner = inner[parent]
        match draw(st.sampled_from(("change", "remove", "add"))):
            case "change":
                inner[key] = draw(JSON)
            case "remove":
                del inner[key]
            case "add" if isinstance(inner, dict):
                inner[draw(st.text(max_size=8))] = inner[key]
            case "add":
                inner.insert(draw(st.integers(0, len(inner))), draw(JSON))
    return value


@st.composite
def damaged(draw: DrawFn, whole: bytes) -> bytes:
    """Bytes that were cut off, flipped, repeated, or had others put into them."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(("cut", "flip", "insert", "overwrite", "repeat", "end"))):
            case "cut":
                del content[at:]
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                content[at:at] = draw(st.binary(max_size=8))
            case "overwrite":
                new = draw(st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\xef\xbb\xbf", "\u2028".encode(), b"\n\r")))
                content[at : at + len(new)] = new
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            case "end":
                content += draw(st.binary(max_size=16))
    return bytes(content)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def text_of_json(whole: Any) -> SearchStrategy[bytes]:
    """A JSON file: its value edited, its bytes damaged, or anything else."""
    return edited(whole).map(as_json) | damaged(as_json(whole)) | JSON.map(as_json) | st.binary(max_size=40)


def lines_of_json(rows: list[Any]) -> SearchStrategy[bytes]:
    whole = b"".join(as_json(row) + b"\n" for row in rows)
    changed = edited(rows).filter(lambda value: isinstance(value, list))
    return changed.map(lambda value: b"\n".join(map(as_json, value))) | damaged(whole) | st.binary(max_size=40)


def taken_or_refused(read: Callable[[], Any], *names: str) -> None:
    """`read` returns, or raises an error for the user: one printable line that has one of `names` in it."""
    try:
        read()
    except FastVKDError as error:
        said = str(error)
        assert said and said.isprintable()
        assert not names or any(name in said for name in names), said


@dataclass(frozen=True)
class Property:
    """What is drawn (of a folder's whole files), and what must hold of it in an empty folder."""

    draws: Callable[[Wholes], SearchStrategy[Any]]
    holds: Callable[[Any, Wholes, Path], None]
    examples: int


PROPERTIES: dict[str, Property] = {}


def drawn_from(draws: Callable[[Wholes], SearchStrategy[Any]], examples: int) -> Callable[[Any], Any]:
    def add(holds: Callable[[Any, Wholes, Path], None]) -> Any:
        PROPERTIES[holds.__name__] = Property(draws, holds, examples)
        return holds

    return add


def written(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# Data.


def lines_in(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def read_all(folder: Path, forget_split: str, retain_split: str) -> None:
    """Every way into a data folder."""
    name = str(folder)
    taken_or_refused(lambda: sources.read_forget_retain(name, forget_split, retain_split), name, "forget", "image")
    taken_or_refused(lambda: sources.evaluation_cells(name, forget_split, retain_split), name, "forget", "image")
    taken_or_refused(lambda: sources.profiles_of_splits(name), name)
    try:
        report = check_data(folder)
    except FastVKDError as error:
        assert str(error).isprintable()
        return
    assert all(line.isprintable() for line in report.lines())


@drawn_from(lambda wholes: lines_of_json(lines_in(wholes.at("jsonl") / "forget.jsonl")), 45)
def own_data(content: bytes, wholes: Wholes, folder: Path) -> None:
    for file in wholes.at("jsonl").iterdir():
        if not (link := folder / file.name).exists():
            link.symlink_to(file)
    (folder / "forget.jsonl").unlink()
    read_all(written(folder / "forget.jsonl", content).parent, "forget", "retain")


def one_row(wholes: Wholes) -> list[Any]:
    file = next((wholes.at("parquet") / wholes.forget_split).glob("*.parquet"))
    row = pq.read_table(file).slice(0, 1).to_pylist()[0]
    return [row | {"image": "forget-0.png"}]


@drawn_from(lambda wholes: text_of_json(one_row(wholes)), 45)
def tables_in_json(content: bytes, wholes: Wholes, folder: Path) -> None:
    written(folder / "forget_5/rows.json", content)
    if not (folder / "retain_95").exists():
        photo = (wholes.at("jsonl") / "retain-0.png").read_bytes()
        written(folder / "forget-0.png", (wholes.at("jsonl") / "forget-0.png").read_bytes())
        written(folder / "retain_95/retain-0.png", photo)
        rows = [row | {"ID": "900", "image": "retain-0.png"} for row in one_row(wholes)]
        written(folder / "retain_95/rows.json", as_json(rows))
    read_all(folder, "forget_5", "retain_95")


def parquet_of(rows: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def own_parquet(wholes: Wholes) -> bytes:
    return next((wholes.at("parquet") / wholes.forget_split).glob("*.parquet")).read_bytes()


@drawn_from(lambda wholes: damaged(own_parquet(wholes)) | st.binary(max_size=40), 45)
def parquet_bytes(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "forget_5/train.parquet", content)
    taken_or_refused(lambda: mllmu.read_split(folder, "forget_5"), str(file))
    taken_or_refused(lambda: sources.recognise(folder), str(folder))
    assert tables.columns(file) is not None


def columns_of_any_kind() -> SearchStrategy[bytes]:
    """A whole parquet file whose columns have the right names and any values."""
    names = ("image", "images", "ID", "biography", "Classification_Task", "Generation_Task", "Mask_Task", "metadata")
    cells = [
        *(pa.array([value]) for value in (None, 1, 1.5, float("nan"), True, "text", b"bytes", "", b"")),
        *(pa.array([value]) for value in ([1], ["text"], [None], {"bytes": b"x", "path": None}, {"a": 1})),
        pa.array([[{"Type": "Image_Textual", "Question": None, "Ground_Truth": "x"}]]),
        pa.array([[{"Type": None, "Question": "x"}]]),
        pa.array([{"Image_Textual_Questions": [{"Question": "x", "Options": "A"}]}]),
        pa.array([{"Image_Textual_Questions": None, "Pure_Text_Questions": [None]}]),
        pa.array(["x"]).dictionary_encode(),
    ]

    def of(columns: dict[str, pa.Array]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()

    return st.dictionaries(st.sampled_from(names), st.sampled_from(cells), min_size=1).map(of)


@drawn_from(lambda wholes: columns_of_any_kind(), 45)
def parquet_columns(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "forget_5/train.parquet", content)
    for read in (mllmu.read_split, mllmu.training_split):
        taken_or_refused(lambda read=read: read(folder, "forget_5"), str(file))
    taken_or_refused(lambda: check_data(folder), str(folder))


@drawn_from(lambda wholes: st.binary(max_size=60) | st.text(max_size=60).map(str.encode), 15)
def comma_separated(content: bytes, wholes: Wholes, folder: Path) -> None:
    written(folder / "forget_5/train.csv", content)
    with pytest.raises(FastVKDError, match=r"train\.csv") as refused:
        sources.recognise(folder)
    assert str(refused.value).isprintable()


def pictures() -> list[bytes]:
    found = []
    for kind, mode in (
        *(("PNG", "RGB"), ("PNG", "I;16"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("BMP", "RGB")),
        *(("TIFF", "F"), ("TIFF", "I;16"), ("WEBP", "RGB"), ("PPM", "RGB")),
    ):
        buffer = io.BytesIO()
        Image.effect_noise((9, 7), 80).convert("L").convert(mode if mode != "I;16" else "I").convert(mode).save(
            buffer, kind
        )
        found.append(buffer.getvalue())
    return found


@drawn_from(lambda wholes: st.sampled_from(pictures()).flatmap(damaged) | st.binary(max_size=60), 120)
def folder_of_images(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "ann/photo.png", content)
    (photos,) = read_strangers(folder)
    taken_or_refused(lambda: decode_image(photos[0].data, photos[0].source), str(file))


# Settings and the command line.

SETTINGS = [*sorted(Settings().to_dict()), "saliency.fraction", "stranger.steps", "certificate.x", "sites.llm:1", ""]


@st.composite
def some_yaml(draw: DrawFn, wholes: Wholes) -> bytes:
    whole = yaml.safe_dump(json.loads(json.dumps(Settings().to_dict()))).encode()
    match draw(st.sampled_from(("damaged", "value", "text"))):
        case "damaged":
            return draw(damaged(whole))
        case "value":
            keys = st.sampled_from(SETTINGS)
            return yaml.safe_dump(draw(st.dictionaries(keys, JSON.filter(writable), max_size=3))).encode()
    return draw(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#?,\n \t0.e", max_size=30)).encode()


def writable(value: Any) -> bool:
    """Whether PyYAML writes it at all: it refuses half a character."""
    try:
        yaml.safe_dump(value).encode()
    except UnicodeEncodeError:
        return False
    return True


@drawn_from(some_yaml, 60)
def yaml_settings(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "settings.yaml", content)
    taken_or_refused(lambda: load_settings(file, ["model_name_or_path=m", "data=d"]))


VALUES = st.sampled_from(
    [*map(str, ODD), "[1", "{a: b}", "*a", "!!python/object:os.system x", "9" * 5000, "0x1", "1:2"]
)


@drawn_from(
    lambda wholes: st.lists(
        st.builds("{}={}".format, st.sampled_from(SETTINGS), VALUES | st.text(max_size=12)) | st.text(max_size=12),
        max_size=3,
    ),
    90,
)
def overrides(texts: list[str], wholes: Wholes, folder: Path) -> None:
    taken_or_refused(lambda: load_settings(None, ["model_name_or_path=m", "data=d", *texts]))


COMMANDS: dict[str, type[opt.Options]] = {
    "train": opt.TrainOptions,
    "eval": opt.EvalOptions,
    "ask": opt.AskOptions,
    "compare": opt.CompareOptions,
    "attack": opt.AttackOptions,
    "report": opt.ReportOptions,
    "steer": opt.SteerOptions,
    "plan": opt.PlanOptions,
    "export": opt.ExportOptions,
    "merge": opt.MergeOptions,
    "requests": opt.RequestsOptions,
    "purge": opt.PurgeOptions,
    "data check": opt.CheckOptions,
}
WORDS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


def test_every_verb_is_called() -> None:
    (verbs,) = (action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    assert {name.split()[0] for name in COMMANDS} == set(verbs) - {"demo", "env"}  # minutes; no options


@st.composite
def arguments(draw: DrawFn, wholes: Wholes) -> list[str]:
    """A command with some of its own options and any values; none names a folder that is there."""
    words = WORDS.filter(lambda word: ".." not in word) | st.sampled_from(
        ("0", "-1", "1e99", "nan", "9" * 5000, "=", "")
    )
    if draw(st.integers(0, 9)) == 0:
        return draw(st.lists(words.filter(lambda word: word not in "demo"), max_size=4))
    command = draw(st.sampled_from(sorted(COMMANDS)))
    told = command.split()
    options = [option for option in opt.options_of(COMMANDS[command]) if option.flag is not None]
    for option in draw(st.lists(st.sampled_from(options), max_size=4)):
        assert option.flag is not None
        if not option.flag.positional:
            told.append(option.flag.name or "--" + option.name.replace("_", "-"))
        if option.kind is not bool and draw(st.integers(0, 9)):
            told += draw(st.lists(words, min_size=1, max_size=2))
    return told


@drawn_from(arguments, 60)
def command_line(told: list[str], wholes: Wholes, folder: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(told)
        except SystemExit as ended:  # --help and --version
            assert ended.code in (0, None)
            return
    errors = [line for line in err.getvalue().splitlines() if line.startswith("fastvkd: error: ")]
    assert code in (0, 1, 2)
    assert len(errors) == (1 if code == 2 and not out.getvalue() else 0), (told, err.getvalue(), out.getvalue())
    assert all(line.isprintable() for line in err.getvalue().split("\n"))


# Models.


def headers() -> SearchStrategy[bytes]:
    """The beginning of a safetensors file: a length, a header, some data."""
    whole = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}

    def file(header: bytes, more: int) -> bytes:
        return (len(header) + more).to_bytes(8, "little", signed=False) + header + bytes(16)

    return st.builds(file, text_of_json(whole), st.sampled_from((0, 0, 0, 1, 100, 2**62)))


@drawn_from(lambda wholes: headers(), 90)
def safetensors_header(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "model.safetensors", content)
    for read in (read_safetensors_header, header_of, samples_of):
        taken_or_refused(lambda read=read: read(file), str(file))


INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@drawn_from(lambda wholes: text_of_json(INDEX), 45)
def index_of_shards(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "model.safetensors.index.json", content)
    taken_or_refused(lambda: shards_of(folder), str(file), str(folder))


@drawn_from(lambda wholes: text_of_json(json.loads((wholes.at("model") / "config.json").read_text())), 45)
def model_config(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "config.json", content)
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(wholes.at("model") / "model.safetensors")
    taken_or_refused(lambda: identify_base(folder), str(file))
    told = load_settings(None, {"model_name_or_path": str(folder), "data": "d"})
    taken_or_refused(lambda: plan(told), str(folder))


# What a run leaves.


def manifest_of(wholes: Wholes) -> dict[str, Any]:
    checkpoint = find_latest(wholes.at("run"))
    assert checkpoint is not None
    return json.loads((checkpoint / "checkpoint.json").read_text())


@drawn_from(lambda wholes: text_of_json(manifest_of(wholes)), 60)
def checkpoint_manifest(content: bytes, wholes: Wholes, folder: Path) -> None:
    checkpoint = folder / "checkpoint-2"
    whole = find_latest(wholes.at("run"))
    assert whole is not None
    for file in whole.iterdir():
        if file.name != "checkpoint.json" and not (checkpoint / file.name).exists():
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / file.name).symlink_to(file)
    written(checkpoint / "checkpoint.json", content)
    taken_or_refused(lambda: verify_checkpoint(checkpoint), str(checkpoint))
    taken_or_refused(lambda: bytes_per_trainable_parameter(checkpoint), str(checkpoint))
    written(folder / "metrics.jsonl", b"")
    taken_or_refused(lambda: collect([folder]), str(folder))


@drawn_from(lambda wholes: text_of_json(json.loads((wholes.at("exported") / "unlearning.json").read_text())), 60)
def record_of_an_export(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "unlearning.json", content)
    taken_or_refused(lambda: [request.line() for request in requests_of(folder)], str(file))
    taken_or_refused(lambda: edited_of(folder), str(file))


def index_of_cache(wholes: Wholes) -> tuple[Path, dict[str, Any]]:
    file = sorted(wholes.at("cache").rglob("index-*.json"))[0]
    return file, json.loads(file.read_text())


@drawn_from(lambda wholes: text_of_json(index_of_cache(wholes)[1]), 60)
def teacher_cache(content: bytes, wholes: Wholes, folder: Path) -> None:
    """A damaged index is passed over: what it names is missing, and what is not missing is whole."""
    file, index = index_of_cache(wholes)
    told = json.loads((file.parent / "ingredients.json").read_text())
    here = FeatureCache(folder, site=told["site"], dtype=told["dtype"], ingredients=told).folder
    data = f"features-{file.stem.removeprefix('index-')}.bin"
    if not (here / data).exists():
        (here / data).symlink_to(file.parent / data)
    written(here / file.name, content)
    cache = FeatureCache(folder, site=told["site"], dtype=told["dtype"], ingredients=told)
    keys = [*index["places"], *cache.spans]
    for key in set(keys) - set(cache.missing(keys)):
        assert cache.features(key).shape[1] == cache.width


def answers(wholes: Wholes) -> list[Any]:
    return lines_in(wholes.at("eval") / "samples.jsonl")


@drawn_from(lambda wholes: lines_of_json(answers(wholes)), 45)
def evaluation_log(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "samples.jsonl", content)

    def paired() -> None:
        base, other = ((str(path), read_samples(path)) for path in (wholes.at("before"), folder))
        never_learnt(*other)
        paired_table(paired_tests(base, other), "text")

    taken_or_refused(paired, str(file), str(folder))
    written(folder / "results.json", (wholes.at("eval") / "results.json").read_bytes())
    taken_or_refused(lambda: write_page([folder], folder / "page.html"), str(folder))
    keep = {line["finished"] for line in answers(wholes) if "finished" in line}
    log = _Log(file, keep)
    assert set(log.finished) <= keep


@drawn_from(lambda wholes: text_of_json(json.loads((wholes.at("eval") / "results.json").read_text())), 60)
def evaluation_results(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "results.json", content)
    taken_or_refused(lambda: comparison_table(read_runs([folder]), "text"), str(file))
    taken_or_refused(lambda: write_page([folder], folder / "page.html"), str(folder))


def a_report() -> dict[str, Any]:
    return build_report(**example_run.report_parts())


@drawn_from(lambda wholes: text_of_json(a_report()), 45)
def report_json(content: bytes, wholes: Wholes, folder: Path) -> None:
    file = written(folder / "report.json", content)
    taken_or_refused(lambda: read_report(file), str(file))
    taken_or_refused(lambda: write_page([folder], folder / "page.html"), str(folder))
    taken_or_refused(lambda: comparison_table(read_runs([folder]), "text"), str(file))


ATTACKS = {
    "models": {"vanilla": "a" * 64, "unlearned": "b" * 64},
    "steering": None,
    **{"data": "d", "forget_split": "forget_5", "retain_split": "retain_95", "evaluation": {}},
    "relearning": [
        {
            **{"share": 1.0, "weights": "visual", "seed": 0, "auc": {"unlearned": 0.3}, "learning_rate": 0.1},
            "curves": {"unlearned": [{"step": 0, "accuracy": 0.25}, {"step": 2, "accuracy": 0.3}]},
        }
    ],
    "certificate": {
        **{"settings": None, "verdict": "passed", "checks": [], "forgotten": {"entities": 1, "images": 1}},
        **{"code": {"versions": {"fastvkd": "0.1.0"}}, "figures": {"chance": 0.25}, "model_fingerprint": "b" * 64},
    },
}


@drawn_from(lambda wholes: text_of_json(ATTACKS), 60)
def attacks_json(content: bytes, wholes: Wholes, folder: Path) -> None:
    written(folder / "attacks.json", content)
    taken_or_refused(lambda: write_page([folder], folder / "page.html"), str(folder))


@drawn_from(lambda wholes: lines_of_json(lines_in(wholes.at("run") / "metrics.jsonl")), 30)
def training_log(content: bytes, wholes: Wholes, folder: Path) -> None:
    written(folder / "metrics.jsonl", content)
    taken_or_refused(lambda: write_page([folder], folder / "page.html"), str(folder))


@dataclass
class Executions:
    """How often a property was tried."""

    name: str
    outcome: str = "failed"
    count: int = field(default=0)


@pytest.mark.parametrize("times", [1, pytest.param(THOROUGH, marks=pytest.mark.proof)])
@pytest.mark.parametrize("name", PROPERTIES)
def test_any_input_is_taken_or_refused_in_one_line(wholes: Wholes, tmp_path: Path, name: str, times: int) -> None:
    known = PROPERTIES[name]
    tried = Executions(name)

    @settings(
        **{"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)},
        max_examples=known.examples * times,
        print_blob=False,
    )
    @given(known.draws(wholes))
    def every_time(value: Any) -> None:
        tried.count += 1
        known.holds(value, wholes, tmp_path)

    try:
        every_time()
        tried.outcome = "as wanted"
    finally:
        note(FAULT, name, tried.outcome, tried.count)
