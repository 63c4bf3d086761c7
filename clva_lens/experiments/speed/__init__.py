"""What interventions cost: ``clva-lens bench``, its cases, its models and the paper's rewriting."""
