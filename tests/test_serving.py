"""docs/serving.md is true: its first two blocks run in order; the one for torchrun runs in tests/engines."""

import re
from pathlib import Path

import transformers

from tsa_compile import Reason, attention

from .support import mixed_padding, tiny, tokens

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path, capsys):
    tiny("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    names = dict(
        AutoModelForCausalLM=transformers.AutoModelForCausalLM, checkpoint=tmp_path, ids=tokens(2, 1300),
        mask=mixed_padding(1300, (0, 70)),
    )  # fmt: skip
    exec(BLOCKS[0], names)
    assert "2 of 3 attention calls sparse" in capsys.readouterr().out
    assert [row.reason for row in attention.report(names["model"])] == [Reason.LAYER_NOT_SELECTED] + [Reason.SPARSE] * 2
    exec(BLOCKS[1], names)
    names["model"].generate(input_ids=names["ids"], attention_mask=names["mask"], max_new_tokens=1)
    assert [row.reason for row in attention.report(names["model"])] == [Reason.SPARSE] + [Reason.LAYER_NOT_SELECTED] * 2
