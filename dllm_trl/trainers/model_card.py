"""TRL's model card with a quick start that decodes by diffusion."""

import re
from pathlib import Path


QUICK_START = """\
## Quick start

```python
import dllm_trl  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForCausalLM.from_pretrained("{model}", dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "What is the sum of the first ten odd numbers?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=256, block_length={block_length})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

"""


class DiffusionModelCardMixin:
    """Mixed into a trainer before TRL's class, whose template is for left-to-right models and cannot be replaced."""

    block_length: int

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` to the output directory. Arguments as in TRL."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if not self.is_world_process_zero():
            return
        file = Path(self.args.output_dir) / "README.md"
        model = self.hub_model_id or model_name or Path(self.args.output_dir).name
        start = QUICK_START.format(model=model, block_length=self.block_length)
        quick_start = re.compile(r"## Quick start.*?(?=## Training procedure)", re.DOTALL)
        card = quick_start.sub(lambda _: start, file.read_text())
        # A model that came from a folder has no page to link to
        card = card.replace("[None](https://huggingface.co/None)", "a diffusion language model")
        card = card.replace(
            "[TRL](https://github.com/huggingface/trl).", "[TRL](https://github.com/huggingface/trl) and dllm-trl."
        )
        file.write_text(card)
