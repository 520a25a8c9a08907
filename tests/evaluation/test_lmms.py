"""`--benchmark lmms:...`: what lmms-eval is told, what is read back, what is said where it goes wrong.

Most tests run a stub that speaks its command line and writes its files. Those marked `lmms` run the package itself:
`FASTVKD_LMMS_PYTHON` names the Python of an environment that has it.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stub_lmms import FAULTS
from tiny_llava import picture, tiny_model, tiny_processor

from fastvkd.cli import main
from fastvkd.engines.exporting import RECORD
from fastvkd.errors import DataError, FastVKDError, ModelError, SettingsError, Terminated
from fastvkd.evaluation.comparison import comparison_table, read_runs
from fastvkd.evaluation.lmms import ADAPTERS, figures_of
from fastvkd.evaluation.run import evaluate
from fastvkd.options import EvalOptions
from fastvkd.photos import decode_image
from fastvkd.settings import Settings

PACKAGE = os.environ.get("FASTVKD_LMMS_PYTHON") or (sys.executable if importlib.util.find_spec("lmms_eval") else None)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny, a=1"  # what separates arguments, in a path
    processor = tiny_processor()
    processor.chat_template = TEMPLATE
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Stub:
    """A program that stands for the Python of lmms-eval; `fault` is how it goes wrong."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.python = folder, folder / "python"
        source = Path(__file__).with_name("stub_lmms.py").read_text()
        self.python.write_text(f"#!{sys.executable}\n{source}")
        self.python.chmod(0o700)
        self.tell()

    def tell(self, fault: str = "", version: str = "0.7.3", ask: tuple[str, ...] = (), **changed: Any) -> None:
        told = {"fault": fault, "version": version, "ask": ask, "changed": changed}
        (self.folder / "told.json").write_text(json.dumps(told))

    @property
    def noted(self) -> dict[str, Any]:
        return json.loads((self.folder / "noted.json").read_text())


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path / "env")


@pytest.fixture
def options(model: Path, stub: Stub, tmp_path: Path):
    def make(**more: Any) -> EvalOptions:
        told = {"benchmark": "lmms:faces,both", "lmms_python": stub.python, "device": "cpu", "out": tmp_path / "out"}
        return EvalOptions(**{"model": str(model), **told, **more})

    return make


def config_of(folder: Path, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    return str(folder)


def test_what_was_measured_is_read_back(options, stub: Stub, tmp_path: Path) -> None:
    bars: list[tuple[int, int]] = []
    results = evaluate(options(max_samples=4), lambda done, total, _: bars.append((done, total)))
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    part = results["lmms_eval"]
    assert (part["version"], part["tasks"], part["adapter"]) == ("0.7.3", "faces,both", "llava_hf")
    assert part["loading"] == {"dtype": "float32", "quantize": "none", "device_map": "none"}
    assert (part["batch_size"], part["max_samples"], part["max_pixels"]) == (1, 4, None)
    assert part["figures"] == [
        {"task": "faces", "metric": "exact_match", "filter": "none", "value": 0.25, "stderr": 0.125, "n": 4},
        {"task": "faces", "metric": "score", "filter": "strict", "value": 1500.0, "stderr": None, "n": 4},
        {"task": "both", "metric": "exact_match", "filter": "none", "value": 0.5, "stderr": None, "n": 7},
    ]
    assert bars == [(0, 4), (2, 4)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_what_lmms_eval_is_told(options, stub: Stub, model: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "faces.yaml").write_text("task: faces")
    evaluate(options(max_samples=3, lmms_tasks=tmp_path / "tasks", bf16=True))
    noted = stub.noted
    assert noted["module"] == ["-m", "lmms_eval"]
    asked = noted["options"]
    assert asked.keys() == {
        *("--model", "--model_args", "--tasks", "--batch_size", "--device", "--output_path", "--verbosity", "--limit"),
        "--include_path",
    }  # neither --log_samples nor --use_cache, --wandb_args or --hf_hub_log_args
    assert (asked["--model"], asked["--batch_size"]) == ("llava_hf", "1")
    assert asked["--tasks"] == "faces,both,faces,both"
    assert (asked["--device"], asked["--limit"], asked["--include_path"]) == ("cpu", "3", str(tmp_path / "tasks"))
    assert noted["config"] == json.loads((model / "config.json").read_text())  # behind a path that can be told
    arguments = noted["arguments"]
    assert Path(arguments.pop("pretrained")).name == "tiny_ a_1" and not Path(asked["--output_path"]).exists()
    assert arguments == {"device_map": "cpu", "dtype": "bfloat16"}


def test_it_has_no_way_to_the_network_and_leaves_no_photos(options, stub: Stub, tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    for name in ("lmms-lab___pope", "parquet"):
        (cache / name).mkdir(parents=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    stub.tell(ask=(*offline, *proxies, "HF_TOKEN", "WANDB_MODE", "no_proxy"))
    evaluate(options())
    found = stub.noted["environment"]
    assert {found[name] for name in offline} == {"1"} and {found[name] for name in proxies} == {"http://127.0.0.1:9"}
    assert (found["HF_TOKEN"], found["WANDB_MODE"], found["no_proxy"]) == (None, "disabled", "127.0.0.1,localhost")
    assert stub.noted["cache"] == ["lmms-lab___pope"]  # what was loaded of a hub is found; a file's copy would be new
    left = {str(path.relative_to(cache)) for path in cache.rglob("*")}
    assert left == {"lmms-lab___pope", "parquet"} and not any((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("family", "adapter", "dtype", "batch_size"),
    [
        ("llava", "llava_hf", "float32", 1),
        ("llava_next", "llava_hf", "float32", 1),
        ("llava_onevision", "llava_hf", "float32", 1),
        ("qwen2_vl", "qwen2_vl", "float16", 32),
        ("qwen2_5_vl", "qwen2_5_vl", "bfloat16", 32),
        ("qwen3_vl", "qwen3_vl", "bfloat16", 32),
        ("internvl", "internvl_hf", "bfloat16", 1),
        ("gemma3", "gemma3", "bfloat16", 32),
    ],
)
def test_every_family_has_its_adapter(
    family: str, adapter: str, dtype: str, batch_size: int, options, stub: Stub, tmp_path: Path
) -> None:
    model = config_of(tmp_path / "model", model_type=family, dtype="float16")
    part = evaluate(options(model=model))["lmms_eval"]
    assert (part["adapter"], part["loading"]["dtype"], part["batch_size"]) == (adapter, dtype, batch_size)
    assert stub.noted["options"]["--model"] == adapter and stub.noted["options"]["--batch_size"] == str(batch_size)
    assert ("dtype" in stub.noted["arguments"]) == (adapter == "llava_hf")
    if adapter != "llava_hf":
        flag = {"bfloat16": "fp32", "float16": "bf16"}[dtype]
        with pytest.raises(SettingsError, match=f"--{flag}: lmms-eval loads this {family} in {dtype} and nothing else"):
            evaluate(options(model=model, **{flag: True}))
    assert {"llava", "llava_next"} <= ADAPTERS.keys()


def test_qwen_sees_photos_as_the_run_that_made_it(options, stub: Stub, tmp_path: Path) -> None:
    model = config_of(tmp_path / "model", model_type="qwen2_5_vl")
    evaluate(options(model=model))
    assert "max_pixels" not in stub.noted["arguments"]
    record = {"settings": Settings().to_dict() | {"max_pixels": 100_352}, "updates": 1, "base_model": {}}
    (tmp_path / "model" / RECORD).write_text(json.dumps(record))
    assert evaluate(options(model=model))["lmms_eval"]["max_pixels"] == 100_352
    assert stub.noted["arguments"].items() >= {"max_pixels": "100352", "min_pixels": "100352"}.items()
    evaluate(options(model=model, max_pixels=1_003_520))
    assert stub.noted["arguments"].items() >= {"max_pixels": "1003520", "min_pixels": "200704"}.items()
    with pytest.raises(SettingsError, match="--max-pixels: lmms-eval has it for Qwen-VL alone, and this is llava"):
        evaluate(options(max_pixels=4096, out=tmp_path / "other"))


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            "unknown",
            SettingsError,
            r"lmms:nosuch,other: lmms-eval has no such task; `.*python -m lmms_eval tasks` lists",
        ),
        ("hub", DataError, r"the data of a task are not at hand \(Couldn't reach 'lmms-lab/POPE'.*load them once"),
        ("file", DataError, r"not at hand \(Unable to find '/data/test.parquet'\).*--lmms-tasks"),
        ("module", ModelError, r"No module named 'decord'; .*python -m pip install decord; .*lmms-eval.log has all"),
        ("memory", ModelError, "CUDA out of memory.*; give a smaller --batch-size, or --device-map auto"),
        ("silence", ModelError, "lmms-eval failed: Traceback"),
        ("table", ModelError, "lmms-eval failed: exit code 1"),
        ("unanswered", ModelError, "lmms-eval left questions unanswered: no room; mend what it names"),
        (
            "form",
            DataError,
            "lmms-eval 0.7.3: results of another form than 0.7.3's .'n-samples'.; install that version",
        ),
    ],
)
def test_what_goes_wrong_in_it_is_one_line(
    fault: str, kind: type[FastVKDError], message: str, options, stub: Stub, tmp_path: Path, capsys
) -> None:
    evaluate(options())
    before = (tmp_path / "out" / "results.json").read_bytes()
    stub.tell(fault)
    with pytest.raises(kind, match=message):
        evaluate(options())
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    log = tmp_path / "out" / "lmms-eval.log"
    assert log.exists() == (fault != "form")
    if fault in FAULTS:
        assert FAULTS[fault] in log.read_text() and "Responding" not in log.read_text()
    told = ["--lmms-python", str(stub.python), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["eval", "--model", options().model, "--benchmark", "lmms:faces", *told]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastvkd: error: ") and line.isprintable()
    if log.exists():
        assert main(["purge", str(tmp_path / "out")]) == 0 and not log.exists()
        evaluate(options(**{"lmms_python": Stub(tmp_path / "other").python}))
        assert not log.exists()


def test_a_log_of_a_failure_goes_when_it_succeeds(options, stub: Stub, tmp_path: Path) -> None:
    stub.tell("module")
    with pytest.raises(ModelError, match="decord"):
        evaluate(options())
    assert (tmp_path / "out" / "lmms-eval.log").stat().st_size
    stub.tell()
    evaluate(options())
    assert not (tmp_path / "out" / "lmms-eval.log").exists()


def test_what_ends_the_wait_ends_lmms_eval(options, stub: Stub) -> None:
    def end(*_: object) -> None:
        raise Terminated

    stub.tell("sleep")
    with pytest.raises(Terminated):
        evaluate(options(), end)
    with pytest.raises(ProcessLookupError):
        os.kill(stub.noted["pid"], 0)


def test_what_cannot_be_started_is_one_line(options, stub: Stub, tmp_path: Path) -> None:
    stub.tell(version="")
    with pytest.raises(SettingsError, match=r"has no lmms-eval; make an environment for it \(.*pip install lmms-eval"):
        evaluate(options())
    with pytest.raises(SettingsError, match=r"--lmms-python .*nowhere: no program"):
        evaluate(options(lmms_python=tmp_path / "nowhere"))
    (tmp_path / "broken").write_bytes(b"\x7fELF\0")
    (tmp_path / "broken").chmod(0o700)
    with pytest.raises(SettingsError, match="broken: Exec format error; name the Python that has lmms-eval"):
        evaluate(options(lmms_python=tmp_path / "broken"))
    (tmp_path / "tasks").mkdir()
    with pytest.raises(SettingsError, match=r"--lmms-tasks .*tasks: no folder with a task file"):
        evaluate(options(lmms_tasks=tmp_path / "tasks"))
    with pytest.raises(ModelError, match="lmms-eval has no adapter for smolvlm that fastvkd knows, but for llava, "):
        evaluate(options(model=config_of(tmp_path / "model", model_type="smolvlm")))


def test_a_task_without_numbers_is_refused(options, stub: Stub) -> None:
    stub.tell(results={"faces": {"alias": "faces", "submission,none": None}})
    with pytest.raises(DataError, match="lmms-eval counted nothing on faces,both"):
        evaluate(options())


def test_figures_are_numbers_alone() -> None:
    values = {"a,none": True, "b,none": float("nan"), "c,none": "0.5", "d": 1, "e,none": 2, "e_stderr,none": None}
    results = {"results": {"t": values}, "n-samples": {"t": {"effective": 3.0}}, "group_subtasks": {}}
    assert figures_of(results) == [{"task": "t", "metric": "e", "filter": "none", "value": 2, "stderr": None, "n": 3}]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"benchmark": "lmms:"}, "--benchmark lmms:: no task is named; for example lmms:pope"),
        ({"benchmark": "lmms:pope,,mme"}, "no task is named"),
        ({"data": "d"}, "--data says nothing to lmms:TASK: leave it out"),
        ({"forget_split": "forget_5"}, "--forget-split says nothing to lmms:TASK"),
        ({"mode": "paper"}, "--mode says nothing"),
        ({"seed": 3}, "--seed says nothing"),
        ({"reference_eval": "x"}, "--reference-eval says nothing"),
        ({"steering": "x"}, "--steering says nothing"),
        ({"quantize": "nf4"}, "--quantize nf4: lmms-eval loads a folder as it is"),
        ({"benchmark": None}, "the following arguments are required: --data"),
        ({"benchmark": "umu", "data": "d", "lmms_tasks": "x"}, "--lmms-tasks belongs to --benchmark lmms:TASK"),
        ({"benchmark": None, "data": "d", "lmms_python": "x"}, "--lmms-python belongs to --benchmark lmms:TASK"),
    ],
)
def test_options_that_do_not_belong_together(told: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EvalOptions(**{"model": "m", "benchmark": "lmms:pope", **told})


def test_it_stands_beside_the_figures_of_the_same_model(world, stub: Stub, tmp_path: Path, capsys) -> None:
    """One folder holds both, whichever comes first; compare shows both, and the page shows its own."""
    told = ["--model", str(world.model), "--device", "cpu", "--out", str(tmp_path / "out"), "--max-samples", "2"]
    splits = ["--forget-split", world.forget_split, "--retain-split", world.retain_split]
    lmms = [*told, "--benchmark", "lmms:faces,both", "--lmms-python", str(stub.python)]
    assert main(["eval", *lmms]) == 0
    assert "lmms-eval 0.7.3 (first 2)" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) in (0, 2)
    assert "lmms-eval alone, which the page does not show" in "".join(capsys.readouterr())
    assert main(["eval", *told, "--data", str(world.data), *splits]) == 0
    both = json.loads((tmp_path / "out" / "results.json").read_text())
    assert both["lmms_eval"]["version"] == "0.7.3" and both["cells"]["forget"]["vqa"]["n"] == 2
    stub.tell(version="0.7.4")
    assert main(["eval", *lmms]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again.pop("lmms_eval")["version"] == "0.7.4" and both.pop("lmms_eval") and again == both
    (row,) = read_runs([tmp_path / "out"])
    assert row.measured == "mllmu corrected, lmms-eval 0.7.4 (first 2)" and "forget VQA acc" in row.figures
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0


def test_figures_of_another_model_are_left_alone(options, stub: Stub, tmp_path: Path) -> None:
    evaluate(options())
    other = config_of(tmp_path / "other", model_type="llava")
    with pytest.raises(DataError, match=r"results.json: figures of another model; give another --out"):
        evaluate(options(model=other))


def test_compare_sets_models_side_by_side(options, stub: Stub, tmp_path: Path) -> None:
    evaluate(options(out=tmp_path / "before"))
    stub.tell(results={"faces": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}})
    evaluate(options(out=tmp_path / "after", max_samples=4))
    rows = read_runs([tmp_path / "before", tmp_path / "after"])
    assert [row.measured for row in rows] == ["lmms-eval 0.7.3", "lmms-eval 0.7.3 (first 4)"]
    assert [row.figures["lmms:faces exact_match"] for row in rows] == [0.25, 0.5]
    assert rows[1].intervals["lmms:faces exact_match"] == pytest.approx([0.304, 0.696])
    lines = [line.split() for line in comparison_table(rows, "text").splitlines()]
    assert ["lmms:faces", "exact_match", "0.250", "[0.005,", "0.495]", "0.500", "[0.304,", "0.696]"] in lines
    assert ["lmms:faces", "score", "strict", "1500.000", "-"] in lines
    (tmp_path / "after" / "results.json").write_text(json.dumps({"lmms_eval": {"figures": [{}]}}))
    with pytest.raises(DataError, match="not as fastvkd writes it"):
        read_runs([tmp_path / "after"])


@pytest.mark.slow
@pytest.mark.lmms
@pytest.mark.skipif(PACKAGE is None, reason="lmms-eval is not installed; FASTVKD_LMMS_PYTHON names where it is")
def test_the_package_itself_measures_a_task_of_ones_own(model: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """Half of the answers that a task asks for are what the model says, by transformers alone; the copy of photos that
    datasets makes of a file is gone, and an unknown task and absent data are named."""
    question, rows = "Where was this person born?", []
    processor, tiny = tiny_processor(), tiny_model(tiny_processor())
    for number in range(6):
        prompt = f"USER: <image>\n{question} ASSISTANT:"
        image = picture(number)
        inputs = processor(images=decode_image(image.data, image.source), text=prompt, return_tensors="pt")
        tokens = tiny.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answer = said if number % 2 else f"not {said}"
        rows.append({"image": {"bytes": image.data, "path": None}, "question": question, "answer": answer})
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tasks / "test.parquet")
    (tasks / "own_utils.py").write_text(
        "import io\nfrom PIL import Image\n\n\ndef seen(doc):\n    data = doc['image']['bytes']\n"
        "    return [Image.open(io.BytesIO(data))]"
        "\n\n\ndef asked(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
        "\n\ndef right(doc, results):\n    return {'right': float(results[0] == doc['answer'])}\n"
    )
    task = "task: own_{0}\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {1}\ntest_split: test\n"
    task += (
        "output_type: generate_until\ndoc_to_visual: !function own_utils.seen\ndoc_to_text: !function own_utils.asked\n"
    )
    task += (
        "doc_to_target: answer\nprocess_results: !function own_utils.right\ngeneration_kwargs:\n  max_new_tokens: 6\n"
    )
    task += "metric_list:\n  - metric: right\n    aggregation: mean\n    higher_is_better: true\n"
    (tasks / "own_births.yaml").write_text(task.format("births", tasks / "test.parquet"))
    (tasks / "own_gone.yaml").write_text(task.format("gone", tasks / "gone.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    told = ["--model", str(model), "--lmms-python", str(PACKAGE), "--lmms-tasks", str(tasks), "--device", "cpu"]

    def run(name: str, *more: str) -> int:
        return main(["eval", *told, "--out", str(tmp_path / name), "--benchmark", f"lmms:{name}", *more])

    monkeypatch.chdir(
        tmp_path
    )  # where the output folder has the task's name, which lmms-eval would take for task files
    assert run("own_births", "--max-samples", "4") == 0
    part = json.loads((tmp_path / "own_births" / "results.json").read_text())["lmms_eval"]
    (figure,) = part["figures"]
    assert figure.pop("stderr") > 0
    assert figure == {"task": "own_births", "metric": "right", "filter": "none", "value": 0.5, "n": 4}
    assert part["version"].startswith("0.7") and not list(tmp_path.rglob("*.arrow"))
    capfd.readouterr()
    assert run("nosuch") == 2
    assert "lmms:nosuch: lmms-eval has no such task" in capfd.readouterr().err
    assert run("own_gone") == 2
    assert "not at hand (Unable to find '" in capfd.readouterr().err
