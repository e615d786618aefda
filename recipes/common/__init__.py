"""What several recipes share: metrics, figures, callbacks."""
