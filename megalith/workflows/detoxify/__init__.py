"""`megalith detoxify`: a model that is trained further on the least toxic half of what it writes itself."""
