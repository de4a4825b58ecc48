"""Price and accuracy of every curvature and structure, beside other tools."""
