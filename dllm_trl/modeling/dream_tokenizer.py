"""Dream's tokenizer: Qwen2's BPE. What differs, the special tokens, stands in the published folder."""

import json
from pathlib import Path

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """In place of the class of this name that published folders have as a file of their own."""

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        # The public class reads no tokenizer.json, but these
        files = self.backend_tokenizer.model.save(str(save_directory), filename_prefix)
        added = Path(
            save_directory, f"{filename_prefix}-added_tokens.json" if filename_prefix else "added_tokens.json"
        )
        added.write_text(json.dumps(self.get_added_vocab(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return (*names, *files, str(added))
