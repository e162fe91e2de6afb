"""What touches NNCF. Importing it checks that the installed frameworks are versions that the plugin knows."""

from nncf_mpq_plugin.requirements import check_versions, supported_here

check_versions(supported_here())
