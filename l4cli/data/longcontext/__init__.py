"""Long texts whose questions have known answers: for testing models, and for teaching them."""
