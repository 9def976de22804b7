"""
The judge of `configs/sdar-4b/process_reward.yaml`, as `--reward_funcs process_judge.process`: an OpenAI-compatible
server that environment variables name. Copy and change it for another judge, or another question.

    JUDGE_URL      address up to /v1, as in http://localhost:8000/v1
    JUDGE_MODEL    name of the model there
    JUDGE_API_KEY  key, if it wants one
    JUDGE_CACHE    folder for its answers, by default runs/verdicts
"""

import os

from dllm_trl.rewards import math_reward, openai_judge, process_reward


for name in ("JUDGE_URL", "JUDGE_MODEL"):
    if name not in os.environ:
        raise ValueError(f"`reward_funcs` has a judge, but the environment variable `{name}` does not say which.")

judge = openai_judge(
    os.environ["JUDGE_URL"],
    os.environ["JUDGE_MODEL"],
    api_key_env="JUDGE_API_KEY" if "JUDGE_API_KEY" in os.environ else None,
    sampling={"temperature": 0.6, "top_p": 0.95, "max_tokens": 10_000},
    time_limit=300.0,
    cache_dir=os.environ.get("JUDGE_CACHE", "runs/verdicts"),
)
process = process_reward(judge, chunk_tokens=200, num_votes=3, outcome=math_reward)
