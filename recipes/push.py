"""Exported folder -> a repository of the Hugging Face Hub, `export.push=ORG/NAME`."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("push", __doc__)

if __name__ == "__main__":
    main()
