"""Run a task of lm-evaluation-harness that downloads nothing on models that bitwright loads.

    bench/peers/install.sh lmeval
    bench/peers/envs/lmeval/bin/python bench/peers/lm_eval_local.py MODEL [MODEL ...]

Which of two words comes next, 24 times, made here; a model is judged by the log-likelihoods of both. One JSON object a model:
accuracy, and the mean log-likelihood margin.
"""

import json
import sys
import tempfile
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import bitwright

QUESTIONS = [
    ("The capital of France is", "Paris", "purple"), ("Water freezes and becomes", "ice", "iron"),
    ("The sun rises in the", "east", "spoon"), ("Two plus two is", "four", "green"),
    ("A dog is an", "animal", "orange"), ("Fire is very", "hot", "square"),
]  # fmt: skip


def task(folder: Path) -> Path:
    """The task's two files."""
    lines = [{"question": q, "choices": [a, b], "answer": 0} for q, a, b in QUESTIONS for _ in range(4)]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {
        "task": "words", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}}, "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "words.yaml").write_text(yaml.safe_dump(said))
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tasks = TaskManager(include_path=str(task(Path(folder))), include_defaults=False)
        for model in sys.argv[1:]:
            wrapped = HFLM(
                pretrained=bitwright.load(model), tokenizer=AutoTokenizer.from_pretrained(model), batch_size=4
            )
            found = simple_evaluate(model=wrapped, tasks=["words"], task_manager=tasks)
            print(json.dumps({"model": model, "acc": found["results"]["words"]["acc,none"]}))


if __name__ == "__main__":
    main()
