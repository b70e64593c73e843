"""Planning in integers: image sizes in, packed sequences out; no pixel is touched here."""
