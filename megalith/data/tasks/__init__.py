"""Tasks that files describe: examples of text with a label, as datasets. A task is a YAML file; those here ship."""
