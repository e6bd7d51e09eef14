"""Which folders make up the package: `kernels/` at the top is installed as alphacl_fast.kernels."""

from setuptools import setup

setup(
    packages=["alphacl_fast", "alphacl_fast.backend", "alphacl_fast.train", "alphacl_fast.kernels"],
    package_dir={"alphacl_fast.kernels": "kernels"},
    package_data={"alphacl_fast": ["py.typed"], "alphacl_fast.kernels": ["README.md", "tuned/*.json"]},
)
