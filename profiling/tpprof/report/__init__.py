"""What a person reads: text, JSON, HTML, diffs, waterfalls."""
