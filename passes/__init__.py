"""Middle floor: a graph in, decisions out; knows no file format and no module class."""
