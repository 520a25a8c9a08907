"""Training, the kernels and the GPU suite need torch, Triton and transformers; the rest is loaded where it is used."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ABSENT = ("nltk", "rouge_score", "resvg_py", "dicebear", "dicebear_styles", "bitsandbytes", "deepspeed")
SCRIPT = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2].split())  # importing any of these fails
import fastvkd_kernels
from fastvkd.settings import load_settings
from fastvkd.unlearning.loop import unlearn
sys.path.insert(0, "benchmarks")
import gpu_suite, kernel_speed, step, tables
from pathlib import Path
import tiny_world
world = sys.argv[1]
tiny_world.write_data(Path(world))
tiny_world.write_model(Path(world), "llava", "small")
values = dict(model_name_or_path=f"{world}/model-llava", data=world, forget_split="forget", retain_split="retain")
values |= dict(output_dir=f"{world}/out", device="cpu", sites="llm:2", max_steps=1, per_device_train_batch_size=4)
assert unlearn(load_settings(None, values)).steps == 1
"""


def test_a_step_and_the_gpu_suite_need_no_optional_part(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), " ".join(ABSENT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
