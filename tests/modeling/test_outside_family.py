"""CONTRIBUTING's promise: its family, objective, sampler and reward work from outside of the package, as written."""

import os
import subprocess
import sys
from pathlib import Path

import dllm_trl


ROOT = Path(__file__).parents[2]
SCRIPT = '''
import ast, re, sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from dllm_trl import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl import TraceRLConfig, TraceRLTrainer
from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from tests.trainers.tiny_rl import EOS_IDS, ON_CPU, TINY, make_prompts, make_tokenizer

page, folder = Path(sys.argv[1]).read_text(), sys.argv[2]
made = type(sys)("made")  # what stands in the page is a module of its own
sys.modules["made"] = made


def run(title):
    """The imports, classes and functions of a section, and `register_family`: what needs a trainer is below."""
    code = re.search(r"```python\\n(.*?)```", page.split(f"## {title}\\n")[1], re.DOTALL)[1]
    body = [n for n in ast.parse(code).body if not ast.unparse(n).startswith(("trainer =", "model.generate"))]
    exec(compile(ast.Module(body, []), title, "exec"), vars(made))


for title in ("A family", "An objective", "A sampler", "A reward"):
    run(title)

tokenizer = make_tokenizer()
torch.manual_seed(0)
values = {**TINY["sdar"], "vocab_size": len(tokenizer), "mask_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}
fresh = AutoModelForCausalLM.from_config(made.MyConfig(**values, bos_token_id=None, tie_word_embeddings=False))
assert type(fresh) is made.MyForCausalLM
fresh.generation_config.eos_token_id = EOS_IDS
fresh.save_pretrained(folder)
tokenizer.save_pretrained(folder)
assert type(AutoConfig.from_pretrained(folder)) is made.MyConfig
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model) is made.MyForCausalLM
assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))

ids = torch.tensor([tokenizer("1+1=")["input_ids"]])
for sampler in ("low_confidence_dynamic", made.rightmost):
    out = model.generate(ids, max_new_tokens=8, remasking_strategy=sampler)
    assert out.shape[1] > ids.shape[1] and 2 not in out[0]
short = DiffusionGenerationConfig(max_new_tokens=8)
rollout = generate_rollouts(model, [ids[0].tolist()], generation_config=short)
assert (rollout.step_map >= 0).any()


def moved(trainer):
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    return any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


one = {**ON_CPU, "max_steps": 1, "learning_rate": 1e-2, "output_dir": folder + "/out"}
rl = {**one, "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8}
reward = [lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))], made.length_reward]
shared = {"reward_funcs": reward, "train_dataset": make_prompts(), "processing_class": tokenizer}
assert moved(TraceRLTrainer(model=folder, args=TraceRLConfig(**rl), **shared))
own = made.LastStepObjective()
assert moved(DiffusionGRPOTrainer(model=folder, args=DiffusionGRPOConfig(**rl), objective=own, **shared))
answers = Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 2, "completion": ["2", "4"] * 2})
assert moved(DiffusionSFTTrainer(folder, DiffusionSFTConfig(**one), train_dataset=answers, processing_class=tokenizer))
print("all of it")
'''


def test_what_the_page_says_works_from_outside(tmp_path):
    """In a process of its own: what is registered is so for the whole process."""
    paths = os.pathsep.join([str(Path(dllm_trl.__file__).parents[1]), str(ROOT)])
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "CONTRIBUTING.md"), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("all of it\n"), done.stderr
