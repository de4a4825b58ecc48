"""How wrong a quadratic model of past loss is, example by example, at any parameters."""
