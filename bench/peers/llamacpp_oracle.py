"""What llama.cpp itself makes of GGUF files: tokens of texts, and logprobs of all tokens that may come next.

    bench/peers/envs/xllamacpp/bin/python bench/peers/llamacpp_oracle.py JOBS.json ANSWERS.json

JOBS: [{"file": PATH, "texts": [TEXT, ...], "prompts": [[ID, ...], ...], "write": [[ID, ...], ...], "lora": PATH of an
adapter, or left out}]. ANSWERS, one a job: {"tokens": [[ID, ...], ...] with special tokens, "logprobs": [{ID: LOGPROB}, ...],
"written": [TEXT, ...]: what is written greedily behind each prompt, at most 32 tokens}, or {"error": TEXT}. Of an encoder
"embed": [[ID, ...], ...] instead of prompts: {"embedded": [[VECTOR, ...], ...]}, the last hidden state of each token. Needs the
wheel xllamacpp alone.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def asked(address: str, path: str, **body: Any) -> Any:
    """What its server answers."""
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def logprobs(address: str, prompt: list[int]) -> dict[str, float]:
    """Of every token, behind a prompt. They are the model's own, whatever is chosen then: always one that is a letter, since
    the server tells none beside an end or half a character."""
    letter = asked(address, "tokenize", content="a")["tokens"][-1]
    how = {"n_predict": 1, "n_probs": 1 << 20, "temperature": 0.0, "cache_prompt": False, "logit_bias": [[letter, 1e4]]}
    said = asked(address, "completion", prompt=prompt, **how)
    return {str(t["id"]): t["logprob"] for t in said["completion_probabilities"][0]["top_logprobs"]}


def written(address: str, prompt: list[int]) -> str:
    """What is written greedily, until an end token."""
    return str(asked(address, "completion", prompt=prompt, n_predict=32, temperature=0.0)["content"])


def embedded(address: str, prompt: list[int]) -> list[list[float]]:
    """The last hidden state of each token."""
    return list(asked(address, "embeddings", content=prompt, embd_normalize=-1)[0]["embedding"])


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """One file's."""
    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.n_ctx, params.n_parallel, params.warmup, params.port, params.verbosity = 256, 1, False, 0, -1
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = 1
    if job.get("embed"):
        params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    if "lora" in job:
        added = xllamacpp.CommonAdapterLoraInfo()
        added.path, added.scale = job["lora"], 1.0
        params.lora_adapters = [added]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        return {"error": str(error)}
    at = server.listening_address
    special = {"add_special": True, "parse_special": True}
    return {
        "tokens": [asked(at, "tokenize", content=text, **special)["tokens"] for text in job.get("texts", [])],
        "logprobs": [logprobs(at, prompt) for prompt in job.get("prompts", [])],
        "embedded": [embedded(at, prompt) for prompt in job.get("embed", [])],
        "written": [written(at, prompt) for prompt in job.get("write", [])],
    }


def main() -> None:
    jobs, answers = (Path(argument) for argument in sys.argv[1:3])
    answers.write_text(json.dumps([answer(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
