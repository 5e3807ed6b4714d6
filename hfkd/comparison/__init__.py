"""Tables, figures and savings of finished runs side by side.

Rows group runs by recipe, and every number comes from the files of a run; only the savings load networks. The room
never imports training or commands.
"""
