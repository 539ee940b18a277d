"""Which features of attention which library has: tried, and judged against float64."""
