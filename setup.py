"""The packages. pyproject.toml cannot list them: templates/ is a folder here, and a package in the wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["caffe_jacinto*"]), "caffe_jacinto.templates"],
    package_dir={"caffe_jacinto.templates": "templates"},
)
