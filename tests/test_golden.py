"""An artifact of each released format version, which every later version of this tool must load to the same numbers.

`golden/artifact-v1` was made once by `prune` (recipe best at 60 %) from a random Llama of one block with 8 features;
its logits were recorded from the dense runtime. Files here are never made anew: a new format gets another.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trim_export.artifact import open_artifact, verify_files
from trim_export.format import FORMAT_VERSION
from trim_export.runtimes import available_runtimes, load

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_released_format_keeps_loading(version: int) -> None:
    directory = GOLDEN / f"artifact-v{version}"
    recorded = load_file(GOLDEN / f"artifact-v{version}-logits.safetensors")
    artifact = open_artifact(directory)
    assert artifact.manifest["format_version"] == version
    assert verify_files(artifact) == []
    for runtime in available_runtimes():
        model = load(directory, runtime, check_hashes=True)
        with torch.no_grad():
            logits = model(recorded["tokens"]).logits
        torch.testing.assert_close(logits, recorded["logits"], rtol=0, atol=1e-5)
