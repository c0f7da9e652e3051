"""A thin PyTorch trainer for demonstrations: behaviour cloning, PPO, DAgger."""
