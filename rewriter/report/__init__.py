"""Reports: what a rewrite did, site by site."""
