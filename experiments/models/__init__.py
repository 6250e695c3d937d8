if not __name__.startswith("meshwright."):
    raise ImportError("import this package as meshwright.models, never as experiments.models")
