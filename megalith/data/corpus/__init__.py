"""Raw text to tokens: which files, their documents and sentences, encoded part by part."""
