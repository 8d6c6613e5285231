"""From what a user asks for to records: plans, stores, the runner, studies, the guard."""
