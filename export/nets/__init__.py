"""Networks of published encoders, in plain torch, with the parameter names of timm."""
