"""What model cards cite, by objective."""

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
