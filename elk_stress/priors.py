"""(interface placeholder: replaced by the priors work)"""
