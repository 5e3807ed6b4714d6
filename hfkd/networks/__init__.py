"""Networks: loading by name, taps on named layers, class matching, the frozen `Teacher`, SimKD's student, costs.

The room holds all that treats a network of timm or transformers as a student or a teacher. It imports only errors,
names, losses, models and data. It never imports recipe, training or hub.
"""
