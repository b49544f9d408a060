"""The method on simulated manipulation, offline: a tiny pi0_fast, MetaWorld skills, figures."""
