"""A policy that balances a pole, trained by evolution strategies on a black box.

Data: episodes of CartPole, simulated by gymnasium.
"""
