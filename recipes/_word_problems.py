"""The embedded task: addition and subtraction word problems, with a tokenizer and a tiny SDAR model made for them."""

import itertools
import random

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dllm_trl import DiffusionGenerationConfig  # importing the package registers the families


NAMES = "Ada Ben Cora Dan Emma Finn Gus Hana Ivy Jon Kim Leo Mia Noah Olga Tom".split()
THINGS = "apples books cards coins eggs marbles pens shells stamps toys".split()
STORIES = {
    "+": [
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} found {a} {things} on Monday and {b} on Friday. How many {things} is that in total?",
        "There are {a} {things} in a box. {name} adds {b} more. How many {things} are in the box?",
        "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
    ],
    "-": [
        "{name} has {a} {things} and sells {b}. How many {things} does {name} have left?",
        "There are {a} {things} in a box. {name} takes {b} out. How many {things} are left in the box?",
        "{name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have now?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
    ],
}
SMALLEST, LARGEST = 2, 15  # numbers in the stories
SPLITS = {"heldout": 600, "validation": 600}  # problems set aside; all others are for training

PAD, END, MASK, UNKNOWN, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|MASK|>", "<|unk|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def work_out(a: int, operator: str, b: int) -> str:
    """A solution: what to do, the calculation, the answer."""
    result = a + b if operator == "+" else a - b
    verb = "add" if operator == "+" else "subtract"
    return f"We {verb}: {a}{operator}{b}={result}. The answer is \\boxed{{{result}}}."


def draw_problem(rng: random.Random) -> tuple[str, int, str, int]:
    """A story, and the calculation that it asks for."""
    a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
    operator = rng.choice("+-")
    if operator == "-":
        a, b = max(a, b), min(a, b)
    name, other = rng.sample(NAMES, 2)
    story = rng.choice(STORIES[operator])
    return story.format(name=name, other=other, things=rng.choice(THINGS), a=a, b=b), a, operator, b


def split_off() -> dict[str, list[tuple[str, int, str, int]]]:
    """The problems that are not for training: the same ones whatever the seed of a run, and no text twice."""
    rng, drawn = random.Random(0), {}
    while len(drawn) < sum(SPLITS.values()):
        problem = draw_problem(rng)
        drawn[problem[0]] = problem
    problems = iter(drawn.values())
    return {name: list(itertools.islice(problems, size)) for name, size in SPLITS.items()}


def make_problems(split: str, size: int | None = None, seed: int = 0, careless: float = 0.0) -> Dataset:
    """
    Word problems: `prompt` (one user message), `completion` (a solution), `answer` (a number, always right).

    Args:
        split (`str`):
            `"heldout"`, `"validation"` or `"train"`. No text is in two splits. The calculations behind them are: there
            are only a few hundred.
        size (`int`, *optional*):
            How many. Needed for `"train"`; by default all of the other splits.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the training problems.
        careless (`float`, *optional*, defaults to `0.0`):
            Share of the subtraction problems whose solution adds, and so ends in a wrong number.
    """
    apart = split_off()
    if split == "train":
        taken = {problem[0] for problems in apart.values() for problem in problems}
        rng = random.Random(seed)
        drawn = (draw_problem(rng) for _ in itertools.count())
        problems = list(itertools.islice((problem for problem in drawn if problem[0] not in taken), size))
    else:
        rng = random.Random(0)
        problems = apart[split][:size]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": story}],
                "completion": [
                    {"role": "assistant", "content": work_out(a, "+" if rng.random() < careless else operator, b)}
                ],
                "answer": str(a + b if operator == "+" else a - b),
            }
            for story, a, operator, b in problems
        ]
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word (with the space before it), per number and per sign."""
    split = pre_tokenizers.Split(Regex(r" ?\\boxed\{| ?[A-Za-z]+|[0-9]+|."), "isolated")
    stories = [story for stories in STORIES.values() for story in stories]
    texts = [
        *(story.format(name=n, other=n, things=t, a=0, b=0) for story in stories for n in NAMES for t in THINGS),
        *(work_out(1, operator, 1) for operator in "+-"),
        *(str(number) for number in range(2 * LARGEST + 1)),
    ]
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    special = [PAD, END, MASK, UNKNOWN, USER, ASSISTANT]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """SDAR with random weights, small enough to train in a minute."""
    config = AutoConfig.for_model(
        "sdar",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.06,
        block_size=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        mask_token_id=tokenizer.mask_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = DiffusionGenerationConfig(  # saved with the model
        max_new_tokens=40,
        do_sample=False,
        remasking_strategy="low_confidence_dynamic",
        confidence_threshold=0.9,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
