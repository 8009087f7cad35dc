"""Single files as they are found in the wild: photographs, masks, tags. Every failure names the file and a remedy."""
