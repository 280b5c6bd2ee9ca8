"""The program that `zray-cluster` runs on a host: sent as text over ssh, held in memory, gone when the connection ends.

It must run where zray is not (yet) installed, so its modules import the standard library and, relatively, one another: on the host the
package has another name (`bundle` in `zray.launcher.ssh`). Python >= 3.10.
"""
