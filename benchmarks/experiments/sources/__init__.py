"""Three sources of error of a quadratic model: how stale it is, which curvature it takes, where training goes."""
