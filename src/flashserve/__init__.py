"""FlashServe: serverless serving of many large language models on few accelerators."""

__version__ = "0.1.0"
