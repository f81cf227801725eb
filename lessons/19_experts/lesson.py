# %% [markdown]
# # 19 Mixture of experts
