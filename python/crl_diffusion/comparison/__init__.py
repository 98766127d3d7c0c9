"""Many runs: methods x seeds as processes of their own, and one report."""
