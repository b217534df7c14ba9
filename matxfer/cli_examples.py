"""Examples of every command, as its ``--help`` shows them; the tests read each of them."""

from __future__ import annotations

#: Lines by command; what stands after ``#`` is for people.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "matxfer predict *.cif -o out.csv                 # formation energy, gap, moduli",
        "matxfer finetune mine.csv --target tc_k -o tc    # a plugin for a property of your own",
        "matxfer predict candidates/ --plugin tc --filter 'tc_k > 20' --sort-by tc_k:desc",
        "matxfer relax *.cif -o relaxed.extxyz            # with the shipped potential",
        "matxfer plugins pack tc                          # one file, to give away",
    ),
    "predict": (
        "matxfer predict POSCAR *.cif run.extxyz table.parquet -o out.csv",
        "matxfer predict candidates/ --plugin my-plugin -o candidates.parquet",
        "matxfer predict table.csv --filter 'band_gap_ev > 1' --sort-by band_gap_ev --top 20",
        "cat *.cif | matxfer predict - --input-format cif",
    ),
    "relax": (
        "matxfer relax *.cif -o relaxed.extxyz --table relaxed.csv",
        "matxfer relax POSCAR -o out.db --plugin si-plugin --fmax 0.01 --pressure-gpa 5",
    ),
    "md": (
        "matxfer md Si.cif -o run.extxyz --ensemble nvt --temperature 600 --supercell 2,2,2",
        "matxfer md Si.cif -o run.extxyz --plugin a --plugin b --max-uncertainty 0.5",
    ),
    "finetune": (
        "matxfer finetune mine.csv --target exfoliation_energy_mev_per_atom -o my-plugin",
        "matxfer finetune mine.csv --target tc_k --split-column split --strategy features",
        "matxfer finetune mine.csv --target band_gap_ev --freeze 2 --retain ewc --strength auto",
        "matxfer finetune frames.extxyz --model mp-potential -o si-plugin",
    ),
    "potential": (
        "matxfer potential frames.extxyz -o my-potential --model mp-small --epochs 50",
        "matxfer potential frames.parquet -o my-potential --split-column split --licence CC-BY-4.0",
    ),
    "shift": (
        "matxfer shift mp.parquet mine.csv --target formation_energy_ev_per_atom",
        "matxfer shift mp.parquet candidates/ --json --figure gap.png",
    ),
    "sources": ("matxfer sources mine.csv --target tc_k --models mp-base,mp-small,my-model",),
    "probe": (
        "matxfer probe a.parquet b.parquet --sources mp-base-strict,mp-small -o map/",
        "matxfer probe mine.csv --target tc_k --leave-out anion",
    ),
    "report": (
        "matxfer report my-plugin -o report.html",
        "matxfer report my-plugin -o report.html --data mine.csv --source-data mp.parquet",
    ),
    "consolidate": ("matxfer consolidate my-plugin mine.csv -o my-model --gamma 0.9",),
    "evaluate": (
        "matxfer evaluate held_out.csv --target band_gap_ev --json",
        "matxfer evaluate mine.csv --target tc_k --plugin my-plugin --split-column split",
    ),
    "pretrain": (
        "matxfer pretrain config.yaml -o my-model",
        "matxfer pretrain config.yaml -o my-model --resume     # after a kill",
    ),
    "models": ("matxfer models", "matxfer models mp-base"),
    "benchmark": ("matxfer benchmark transfer --tasks jarvis_2d_eform --splits 0 --threads 1",),
    "benchmark transfer": (
        "matxfer benchmark transfer --data ../shared/data --variants auto,scratch --threads 1",
    ),
    "benchmark curves": (
        "matxfer benchmark curves --tasks jarvis_2d_eform --splits 0 --shares 5,25,100",
    ),
    "benchmark plane": (
        "matxfer benchmark plane --tasks jarvis_2d_exfoliation --splits 0 --threads 1",
    ),
    "benchmark matbench": (
        "matxfer benchmark matbench --tasks phonons --threads 1 --authors 'A. Uthor'",
        "matxfer benchmark matbench --data tables/ --tasks jdft2d,dielectric --repeats 3",
    ),
    "datasets": ("matxfer datasets list", "matxfer datasets fetch matbench_phonons"),
    "datasets list": ("matxfer datasets list", "matxfer datasets list --json"),
    "datasets info": ("matxfer datasets info matbench_phonons",),
    "datasets fetch": (
        "matxfer datasets fetch matbench_phonons -o phonons.parquet",
        "matxfer datasets fetch matbench_phonons --from matbench_phonons.json.gz   # offline",
        "matxfer datasets fetch optimade:mp --filter 'nelements=2' --limit 500 -o li.parquet",
    ),
    "datasets convert": (
        "matxfer datasets convert my.db --column gap=band_gap_ev -o my.parquet",
        "matxfer datasets convert frame.json.gz --column 'k=bulk_modulus_vrh_gpa:log10(GPa)'",
    ),
    "plugins": (
        "matxfer plugins list",
        "matxfer plugins pack my-plugin                       # my-plugin.matxfer.zip",
        "matxfer plugins verify my-plugin.matxfer.zip",
        "matxfer predict *.cif --plugin my-plugin.matxfer.zip",
    ),
    "plugins list": ("matxfer plugins list", "matxfer plugins list plugins/ --json"),
    "plugins info": (
        "matxfer plugins info my-plugin",
        "matxfer plugins info my-plugin.matxfer.zip --json",
    ),
    "plugins verify": (
        "matxfer plugins verify my-plugin other.matxfer.zip",
        "matxfer plugins verify hf://ada/exfoliation@v1 --json",
    ),
    "plugins pack": ("matxfer plugins pack my-plugin -o mail/my-plugin.matxfer.zip",),
    "plugins unpack": ("matxfer plugins unpack my-plugin.matxfer.zip -o my-plugin",),
    "plugins push": (
        "matxfer plugins push my-plugin ada/exfoliation --licence cc-by-4.0",
        "matxfer plugins push my-plugin ada/exfoliation --show-card     # sends nothing",
    ),
    "plugins pull": (
        "matxfer plugins pull ada/exfoliation -o exfoliation",
        "matxfer plugins pull ada/exfoliation --revision v1",
    ),
}
