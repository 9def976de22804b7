"""What model cards cite, by objective: of fine-tuning in `PAPERS`, of reinforcement learning in `RL_PAPERS`."""

import textwrap


# docstyle-ignore
PAPERS = {
    "block": {
        "title": "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models",
        "id": "2503.09573",
        "citation": textwrap.dedent("""\
            @inproceedings{arriola2025block,
                title        = {{Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models}},
                author       = {Marianne Arriola and Aaron Gokaslan and Justin T. Chiu and Zhihan Yang and Zhixuan Qi and Jiaqi Han and Subham Sekhar Sahoo and Volodymyr Kuleshov},
                year         = 2025,
                booktitle    = {The Thirteenth International Conference on Learning Representations, ICLR 2025},
                url          = {https://arxiv.org/abs/2503.09573},
            }"""),  # noqa: E501
    },
    "coupled": {
        "title": "DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
        "id": "2506.20639",
        "citation": textwrap.dedent("""\
            @article{gong2025diffucoder,
                title  = {{DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation}},
                author = {Shansan Gong and Ruixiang Zhang and Huangjie Zheng and Jiatao Gu and Navdeep Jaitly and Lingpeng Kong and Yizhe Zhang},
                year   = 2025,
                eprint = {arXiv:2506.20639},
            }"""),  # noqa: E501
    },
    "diffu_grpo": {
        "title": "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        "id": "2504.12216",
        "citation": textwrap.dedent("""\
            @article{zhao2025d1,
                title  = {{d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning}},
                author = {Siyan Zhao and Devaansh Gupta and Qinqing Zheng and Aditya Grover},
                year   = 2025,
                eprint = {arXiv:2504.12216},
            }"""),
    },
    "random_mask": {
        "title": "Large Language Diffusion Models",
        "id": "2502.09992",
        "citation": textwrap.dedent("""\
            @article{nie2025large,
                title  = {{Large Language Diffusion Models}},
                author = {Shen Nie and Fengqi Zhu and Zebin You and Xiaolu Zhang and Jingyang Ou and Jun Hu and Jun Zhou and Yankai Lin and Ji-Rong Wen and Chongxuan Li},
                year   = 2025,
                eprint = {arXiv:2502.09992},
            }"""),  # noqa: E501
    },
    "unigrpo": {
        "title": "MMaDA: Multimodal Large Diffusion Language Models",
        "id": "2505.15809",
        "citation": textwrap.dedent("""\
            @article{yang2025mmada,
                title  = {{MMaDA: Multimodal Large Diffusion Language Models}},
                author = {Ling Yang and Ye Tian and Bowen Li and Xinchen Zhang and Ke Shen and Yunhai Tong and Mengdi Wang},
                year   = 2025,
                eprint = {arXiv:2505.15809},
            }"""),  # noqa: E501
    },
    "trace": {
        "title": "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models",
        "id": "2509.06949",
        "citation": textwrap.dedent("""\
            @article{wang2025revolutionizing,
                title  = {{Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models}},
                author = {Yinjie Wang and Ling Yang and Bowen Li and Ye Tian and Ke Shen and Mengdi Wang},
                year   = 2025,
                eprint = {arXiv:2509.06949},
            }"""),
    },
}
RL_PAPERS = {name: PAPERS[name] for name in ("coupled", "diffu_grpo", "trace")} | {"random_mask": PAPERS["unigrpo"]}
